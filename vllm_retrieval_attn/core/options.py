# SPDX-License-Identifier: Apache-2.0
"""How a request wants the host searched: the knobs' defaults, and what it overrides through ``vllm_xargs``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_retrieval_attn.core.config import RetrievalConfig

NAMES = ("retrieval_rows", "retrieval_tau", "retrieval_exact")
"""Keys of ``extra_args`` (``vllm_xargs`` over HTTP) that a request may set."""
MOST_NUMBER = 1e18
REPLACED = {
    "retrieval_budget": "retrieval_rows",
    "retrieval_rerank": "retrieval_rows",
    "retrieval_tail": "retrieval_rows",
}


@dataclass(frozen=True)
class SearchOptions:
    """Attributes:
    rows: host rows read for each KV head, on average and at most. tau: share of the attention from which on a key
        is always read. exact: attend to every host token.
    seed: of the draws.
    """

    rows: int = 1024
    tau: float = 0.001
    exact: bool = False
    seed: int = 0


def search_options(
    config: "RetrievalConfig", extra_args: dict[str, Any] | None, seed: int | None = None
) -> SearchOptions:
    """The options of a request; ``seed``: its own, if it has one.

    Raises:
        ValueError: one line that names the argument.
    """
    given = {name: value for name, value in (extra_args or {}).items() if name.lower().startswith("retrieval")}
    for name in sorted(given.keys() - set(NAMES)):
        if name in REPLACED:
            raise ValueError(f"retrieval: request argument {name!r} is no more; use {REPLACED[name]!r}")
        raise ValueError(f"retrieval: unknown request argument {name!r}; known are {', '.join(NAMES)}")
    if given and config.index != "attention":
        raise ValueError(
            f"retrieval: {sorted(given)[0]} has no meaning with index={config.index!r}; drop it from the request"
        )
    rows = given.get("retrieval_rows", config.rows)
    if not _is_number(rows) or rows != int(rows) or not 1 <= rows <= config.max_rows:
        raise ValueError(
            f"retrieval: retrieval_rows={rows!r} must be a whole number from 1 to this server's "
            f"max_rows={config.max_rows}"
        )
    tau = given.get("retrieval_tau", config.tau)
    if not _is_number(tau) or not config.min_tau <= tau <= 1:
        raise ValueError(
            f"retrieval: retrieval_tau={tau!r} must be a number from this server's min_tau={config.min_tau:g} to 1"
        )
    exact = given.get("retrieval_exact", False)
    if exact not in (0, 1):
        raise ValueError(f"retrieval: retrieval_exact={exact!r} must be true or false (or 1 or 0)")
    if exact and not config.allow_exact:
        raise ValueError("retrieval: retrieval_exact is not allowed on this server (allow_exact is false)")
    return SearchOptions(int(rows), float(tau), bool(exact), seed or 0)


def _is_number(value: Any) -> bool:
    # An integer of any length can come in JSON, and not every one has a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER
