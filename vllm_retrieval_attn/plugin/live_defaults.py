# SPDX-License-Identifier: Apache-2.0
"""Knobs that an operator changes while the server runs. ``rows`` and ``tau`` are written into each request that arrives
and does not choose for itself; requests that run keep theirs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.core.options import search_options

if TYPE_CHECKING:
    from vllm_retrieval_attn.core.config import ResolvedConfig


@dataclass
class LiveDefaults:
    """Of one API server. None: as the server was started with. fidelity: as its workers were told."""

    rows: int | None = None
    tau: float | None = None
    fidelity: float | None = None

    @staticmethod
    def check(config: "ResolvedConfig", rows: int | None, tau: float | None) -> None:
        """Whether these may be taken.

        Raises:
            ValueError: one line that names what is wrong with them.
        """
        search_options(config, _arguments(rows, tau))

    def take(self, rows: int | None, tau: float | None, fidelity: float | None) -> None:
        """Take those that are given."""
        self.rows = self.rows if rows is None else rows
        self.tau = self.tau if tau is None else tau
        self.fidelity = self.fidelity if fidelity is None else fidelity

    def changed(self) -> dict[str, float]:
        """What is not as the server was started with."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def fill(self, extra_args: dict[str, Any] | None) -> dict[str, Any] | None:
        """A request's arguments, with these defaults where it has none."""
        mine = _arguments(self.rows, self.tau)
        return {**mine, **(extra_args or {})} if mine else extra_args


def _arguments(rows: int | None, tau: float | None) -> dict[str, Any]:
    given = {"retrieval_rows": rows, "retrieval_tau": tau}
    return {name: value for name, value in given.items() if value is not None}


live_defaults = LiveDefaults()
