# SPDX-License-Identifier: Apache-2.0
"""What the sketch on the GPU has to do in a step: rows that it answers, and tokens to code."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.device.decode_step import StepRow
from vllm_retrieval_attn.store.requests import RequestStore

Ints = npt.NDArray[np.int64]


def no_tokens() -> Ints:
    """An empty array of token or page numbers."""
    return np.empty(0, np.int64)


@dataclass
class SketchPlan:
    """Attributes:
    rows: of the descriptor (device/decode_step.py). ids: request of each, None for one that has nothing on the host.
    tokens: batch token of each row. tables: page table and its generation of each row.
    probe: row to compare with exact attention, -1: none.
    encode_tokens, encode_pages, encode_offsets, encode_spaces: batch tokens to code, where, and in which space; a
        graph codes its own.
    """

    rows: list[StepRow] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    tables: list[tuple[int, int]] = field(default_factory=list)
    probe: int = -1
    encode_tokens: Ints = field(default_factory=no_tokens)
    encode_pages: Ints = field(default_factory=no_tokens)
    encode_offsets: Ints = field(default_factory=no_tokens)
    encode_spaces: Ints = field(default_factory=no_tokens)

    def add_empty(self, token: int) -> None:
        """A row that the kernels leave alone."""
        self._add(None, token, StepRow(0, -1, 0, 0, 1.0, 0, 0, (), ()), (-1, 0))

    def add(
        self, store: RequestStore, token: int, attended: int, write: int, position: int, how: SearchOptions
    ) -> None:
        """A row that attends to host tokens ``[0, attended)``, and writes host token ``write`` (-1: none)."""
        row = StepRow(
            attended, write, position, how.rows, how.tau, how.seed, store.space, tuple(store.pages), tuple(store.codes)
        )
        self._add(store.request_id, token, row, (store.slot, store.generation))

    def _add(self, request_id: str | None, token: int, row: StepRow, table: tuple[int, int]) -> None:
        self.rows.append(row)
        self.ids.append(request_id)
        self.tokens.append(token)
        self.tables.append(table)

    @property
    def attends(self) -> bool:
        """Whether any row attends to host tokens."""
        return any(row.tokens > 0 for row in self.rows)


def stacked(parts: list[tuple[Any, ...]]) -> list[Ints]:
    """Arrays of several tuples of arrays, one after the other."""
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]
