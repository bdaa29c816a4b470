# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a decode step are told: fixed sizes, and the descriptor that changes from step to step.

decode_common.cuh reads what is written here. Nothing here needs CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.sketch.sampling import TILE
from vllm_retrieval_attn.store.layout import TAU_UNIT

PAGE = 1024
"""Tokens of a page, of the host arena and of the sketch."""
TILES = PAGE // TILE
RUN = 4
"""Neighbouring pages of a row that one block of the GPU attends to; a row's entries are filled up to a multiple."""
HEADER, FIELDS = 2, 8
"""int64 numbers at the descriptor's start (rows, entries), and of each row after it."""
DIMS = (64, 80, 96, 128, 256)
MOST_GROUP = 12
MOST_LAYERS = 192
"""Their paged caches are named in the parameters of one launch (decode_write.cuh)."""
MOST_TOKENS = 1 << 21
"""Host tokens of a row stay below this: histogram counts have 21 bits (decode_common.cuh)."""
Numbers = npt.NDArray[np.int64]


def padded_size(dim: int) -> int:
    """Coordinates of a code: the head size rounded up to a multiple of 64."""
    return -(-dim // 64) * 64


def code_bytes(dim: int) -> int:
    """Bytes of a key of ``dim`` dimensions in the sketch: its code and a float16 step."""
    return padded_size(dim) // 2 + 2


@dataclass(frozen=True)
class Geometry:
    """Sizes that stay the same for the life of a process; all counts are of this rank.

    Attributes:
        layers: retrieval layers. kv_heads: KV heads; group: query heads of each. dim: head size.
        dtype: "bfloat16" or "float16", of queries, keys, values and the arena.
        rows: most rows of a batch. entries: most pages of all rows of a step together, each row's a multiple of RUN.
        host_pages, sketch_pages: capacity of the arena and of the sketch.
        first_head: number of this rank's first KV head in the whole model. scale: of the softmax.
    """

    layers: int
    kv_heads: int
    group: int
    dim: int
    dtype: str
    rows: int
    entries: int
    host_pages: int
    sketch_pages: int
    scale: float
    first_head: int = 0

    def __post_init__(self) -> None:
        if self.dim not in DIMS:
            raise ValueError(f"head size {self.dim} is none of {DIMS}")
        if not 1 <= self.group <= MOST_GROUP:
            raise ValueError(f"{self.group} query heads a KV head are not within 1 and {MOST_GROUP}")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"{self.layers} layers are more than {MOST_LAYERS}")
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"{self.dtype} is neither bfloat16 nor float16")

    @property
    def padded(self) -> int:
        """See padded_size."""
        return padded_size(self.dim)

    @property
    def key_bytes(self) -> int:
        return self.padded // 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one layer and KV head in a sketch page: codes of 1,024 keys, then their float16 steps."""
        return PAGE * code_bytes(self.dim)

    @property
    def sketch_page_bytes(self) -> int:
        return self.layers * self.kv_heads * self.block_bytes

    @property
    def fragments(self) -> int:
        """Matrix fragments of eight columns: four query heads with two digits each."""
        return -(-self.group // 4)

    @property
    def items(self) -> int:
        """(entry, KV head) pairs of a step, at most."""
        return self.entries * self.kv_heads

    @property
    def runs(self) -> int:
        """Runs of a step, at most."""
        return self.items // RUN

    @property
    def descriptor_numbers(self) -> int:
        return HEADER + self.rows * FIELDS + 2 * self.entries


@dataclass(frozen=True)
class StepRow:
    """One row of the batch.

    Attributes:
        tokens: host tokens attended to, from the first one on. write: host token number of this step's token, -1: none.
        position: of the token in its request. limit: keys read on average, at most. tau: weight from which on a key is
            always read. seed: the request's. space: 0 the constant rotation, 1 the learned space.
        host_pages, sketch_pages: page numbers in order; both have the page of ``write``, too.
    """

    tokens: int
    write: int
    position: int
    limit: int
    tau: float
    seed: int
    space: int
    host_pages: Sequence[int]
    sketch_pages: Sequence[int]


def entries_of(row: StepRow) -> int:
    """Entries that a row has in the descriptor: its pages, filled up to whole runs."""
    return -(-len(row.host_pages) // RUN) * RUN


def most_entries(pages: int, rows: int) -> int:
    """Entries that ``pages`` pages take, however they belong to ``rows`` rows."""
    return (pages + (RUN - 1) * min(rows, pages)) // RUN * RUN


def describe(rows: Sequence[StepRow], geometry: Geometry, out: Numbers) -> int:
    """Write the descriptor of one step into ``out`` (int64, geometry.descriptor_numbers); returns numbers written.

    Raises:
        ValueError: more rows or pages than the geometry allows.
    """
    entries = sum(map(entries_of, rows))
    if len(rows) > geometry.rows or entries > geometry.entries:
        raise ValueError(f"{len(rows)} rows with {entries} pages exceed {geometry.rows} with {geometry.entries}")
    out[0], out[1] = len(rows), entries
    first, at = 0, HEADER + FIELDS * len(rows)
    for number, row in enumerate(rows):
        if row.tokens >= MOST_TOKENS:
            raise ValueError(f"{row.tokens} host tokens of one row exceed {MOST_TOKENS - 1}")
        begin = HEADER + FIELDS * number
        seed = np.uint64(row.seed & (1 << 64) - 1).view(np.int64)
        out[begin : begin + FIELDS] = (
            row.tokens, row.write, row.position, row.limit, round(row.tau / TAU_UNIT), seed, row.space, first
        )  # fmt: skip
        count, end = len(row.host_pages), at + 2 * entries_of(row)
        out[at : at + 2 * count : 2], out[at + 1 : at + 2 * count : 2] = row.host_pages, row.sketch_pages
        out[at + 2 * count : end] = -1
        first, at = first + entries_of(row), end
    return at


def descriptor_of(rows: Sequence[StepRow], geometry: Geometry) -> Numbers:
    """:func:`describe` into new memory of full size."""
    out = np.zeros(geometry.descriptor_numbers, np.int64)
    describe(rows, geometry, out)
    return out


def items_of(rows: Sequence[StepRow], number: int, head: int, geometry: Geometry) -> slice:
    """Which items of scratch belong to one (row, KV head): one an entry, those of its pages first."""
    first, entries = sum(map(entries_of, rows[:number])), entries_of(rows[number])
    begin = first * geometry.kv_heads + head * entries
    return slice(begin, begin + entries)
