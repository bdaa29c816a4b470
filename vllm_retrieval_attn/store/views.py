# SPDX-License-Identifier: Apache-2.0
"""NumPy views of the shared file, the same in the vLLM worker and in the actors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.sketch.space import Space
from vllm_retrieval_attn.store.layout import (
    ACTOR_PID,
    ACTOR_PROBES,
    ACTOR_WORDS,
    FIDELITY_FIELDS,
    FIXED_WORDS,
    LINE,
    MSG_HEADER,
    ROW_FIELDS,
    SLOT_FIELDS,
    STAT_FIELDS,
    WORD_PROBES,
    Layout,
)

Array = npt.NDArray[Any]


def polled_words(layout: Layout, memory: Any) -> Array:
    """(words,) int32 polled words of the file ``memory``, strided to one a cache line."""
    offset, size = layout.parts["words"]
    words: Array = np.frombuffer(memory, np.int32, size // 4, offset)[:: LINE // 4]
    return words


def actor_word(actor: int, which: int = ACTOR_PID) -> int:
    """Index into the words of an actor's word; ACTOR_PID is 0 while it is not attached."""
    return FIXED_WORDS + actor * ACTOR_WORDS + which


class Views:
    """Arrays over one rank's shared file.

    The vLLM worker writes all but ``stats``, ``read``, ``partials``, ``chosen``, ``fidelity`` and actors' words.

    Attributes:
        words: (words,) int32 polled words, strided to one a cache line.
        tables: (max_rows, table_pages) int64 page numbers of live requests. slots: (max_rows, SLOT_FIELDS) int64.
        header, rows, stats: the request message and what lanes report.
        queries: the query area as bytes. outside: (max_rows, heads) float32 LSE of each row's paged part.
        read: (max_rows, kv_heads) int32 rows read, which actors add to.
        partials: (max_rows, kv_heads, partial_floats) float32.
        spaces: (layers, kv_heads, space_floats) float32, the learned space.
        probe_numbers: (probe_numbers,) int64. fidelity: (actors, layers, FIDELITY_FIELDS) float64.
        probe: (layers, heads, probe_floats) float32. chosen: (layers, kv_heads, 1 + most_chosen) int32: how many rows
            the probed step read of those that are searched through the index, and which.
        pages: all pages as bytes, see store/page_tensor.py; empty in a process that can not map them.

    Args:
        layout: of the file. memory: the file. pages: the pages, where they do not lie in the file but in this process.
    """

    def __init__(self, layout: Layout, memory: Any, pages: Array | None = None) -> None:
        self._layout = layout
        self._raw: Array = np.frombuffer(memory, np.uint8)
        lay = layout
        self.words: Array = polled_words(layout, memory)
        self.tables: Array = self._part("tables", np.int64).reshape(lay.max_rows, lay.table_pages)
        self.slots: Array = self._part("slots", np.int64).reshape(lay.max_rows, SLOT_FIELDS)
        numbers = self._part("numbers", np.int64)
        self.header: Array = numbers[:MSG_HEADER]
        rows_end = MSG_HEADER + lay.max_rows * ROW_FIELDS
        self.rows: Array = numbers[MSG_HEADER:rows_end].reshape(lay.max_rows, ROW_FIELDS)
        self.stats: Array = numbers[rows_end:].reshape(lay.actors, STAT_FIELDS)
        self.queries: Array = self._part("queries", np.uint8)
        self.outside: Array = self._part("outside", np.float32).reshape(lay.max_rows, lay.heads)
        self.read: Array = self._part("read", np.int32).reshape(lay.max_rows, lay.kv_heads)
        self.partials: Array = self._part("partials", np.float32).reshape(
            lay.max_rows, lay.kv_heads, lay.partial_floats
        )
        heads = (lay.layers, lay.kv_heads) if lay.indexed else (0, lay.kv_heads)
        self.spaces: Array = self._part("spaces", np.float32).reshape(*heads, lay.space_floats)
        self.chosen: Array = self._part("chosen", np.int32).reshape(lay.layers, lay.kv_heads, 1 + lay.most_chosen)
        probe = self._part("probe", np.uint8)
        numbers_end = lay.probe_numbers * 8
        fidelity_end = numbers_end + lay.actors * lay.layers * FIDELITY_FIELDS * 8
        self.probe_numbers: Array = probe[:numbers_end].view(np.int64)
        self.fidelity: Array = (
            probe[numbers_end:fidelity_end].view(np.float64).reshape(lay.actors, lay.layers, FIDELITY_FIELDS)
        )
        self.probe: Array = probe[fidelity_end:].view(np.float32).reshape(lay.layers, lay.heads, lay.probe_floats)
        self.pages: Array = self._raw[lay.pages_offset : lay.file_bytes] if pages is None else pages

    def _part(self, name: str, dtype: Any) -> Array:
        offset, size = self._layout.parts[name]
        found: Array = self._raw[offset : offset + size].view(dtype)
        return found

    def actor_word(self, actor: int, which: int = ACTOR_PID) -> int:
        """Index into ``words`` of an actor's word; ACTOR_PID is 0 while it is not attached."""
        return actor_word(actor, which)

    def probing(self) -> bool:
        """Whether a probe has been handed over that not all actors are done with."""
        handed = int(self.words[WORD_PROBES])
        return any(int(self.words[self.actor_word(a, ACTOR_PROBES)]) != handed for a in range(self._layout.actors))

    def learned_space(self, layer: int, head: int) -> Space:
        """The learned space of one KV head, without the first axis."""
        dim, numbers = self._layout.dim, self.spaces[layer, head]
        keys, queries = numbers[dim:].reshape(2, dim, dim)
        return Space(numbers[:dim], keys, queries)

    def keep_space(self, space: Space) -> None:
        """Write a learned space of all layers' KV heads, (layers * kv_heads) of them in order."""
        parts = [part.reshape(space.heads, -1) for part in (space.mean, space.keys, space.queries)]
        self.spaces[:] = np.concatenate(parts, axis=1).reshape(self.spaces.shape)
