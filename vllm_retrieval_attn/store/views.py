"""NumPy views of the shared file, the same in the vLLM worker and in the actors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    FIXED_WORDS,
    LANE_WORDS,
    MSG_HEADER,
    ROW_FIELDS,
    STAT_FIELDS,
    Layout,
)

Array = npt.NDArray[Any]


class Views:
    """Arrays over one rank's shared file. The vLLM worker writes all but ``stats``, ``partials`` and lanes' words.

    Attributes:
        words: (words,) int32 polled words, strided to one a cache line.
        tables: (max_rows, table_pages) int64 page numbers of live requests.
        header, rows, stats: the request message and what lanes report.
        queries16, queries32: the query area as uint16 and as float32.
        partials: (actors, actor_partials, partial_floats) float32.
        pages16, pages32: all pages as uint16 and as float32 elements.
    """

    def __init__(self, layout: Layout, buffer: Any) -> None:
        raw = np.frombuffer(buffer, np.uint8)
        line = 16
        words = raw[: layout.words * line * 4].view(np.int32)
        self.words: Array = words[::line]
        tables = raw[layout.tables_offset :][: layout.max_rows * layout.table_pages * 8]
        self.tables: Array = tables.view(np.int64).reshape(layout.max_rows, layout.table_pages)
        numbers = raw[layout.numbers_offset :][: layout.numbers * 8].view(np.int64)
        self.header: Array = numbers[:MSG_HEADER]
        rows_end = MSG_HEADER + layout.max_rows * ROW_FIELDS
        self.rows: Array = numbers[MSG_HEADER:rows_end].reshape(layout.max_rows, ROW_FIELDS)
        self.stats: Array = numbers[rows_end:].reshape(layout.lanes, STAT_FIELDS)
        self.queries: Array = raw[layout.queries_offset :][
            : layout.max_rows * layout.heads * layout.dim * layout.itemsize
        ]
        self.queries16: Array = self.queries.view(np.uint16)
        self.queries32: Array = self.queries[: self.queries.size // 4 * 4].view(np.float32)
        partials = raw[layout.partials_offset :][: layout.actors * layout.actor_partials * layout.partial_floats * 4]
        self.partials: Array = partials.view(np.float32).reshape(
            layout.actors, layout.actor_partials, layout.partial_floats
        )
        pages = raw[layout.pages_offset : layout.file_bytes]
        self.pages: Array = pages
        self.pages16: Array = pages.view(np.uint16)
        self.pages32: Array = pages.view(np.float32)
        self._lane_base = FIXED_WORDS
        self._actor_base = FIXED_WORDS + layout.lanes * LANE_WORDS

    def lane_word(self, lane: int, which: int) -> int:
        """Index into ``words`` of a lane's word."""
        return self._lane_base + lane * LANE_WORDS + which

    def actor_word(self, actor: int) -> int:
        """Index into ``words`` of an actor's process id (0: not attached)."""
        return self._actor_base + actor
