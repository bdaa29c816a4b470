# SPDX-License-Identifier: Apache-2.0
"""The indexes that an actor holds: one for each request, layer and KV head of its share.

They live in the actor's own memory. All that they are made of lies in the shared file, so a restarted actor makes them
again, those of a layer at the latest when its next message comes. An index holds the tokens that a step has asked for
or has let be indexed, never more: what a search finds does not depend on timing.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_retrieval_attn.index.elsewhere import Source, copies, load_paged_keys, source_of
from vllm_retrieval_attn.index.head import HeadIndex
from vllm_retrieval_attn.sketch.space import LEARNED, rotated
from vllm_retrieval_attn.store.layout import SLOT_GENERATION, SLOT_INDEXED, SLOT_SPACE, WORD_CLIENT_PID, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.sync import full_fence

_PIECE = 4096
"""Tokens coded in one go: few enough that their coordinates stay in the cache, many enough that threads seldom wait for
Python's lock."""

Key = tuple[int, int, int]
"""Page table, layer, KV head."""


class RequestGone(Exception):
    """The page table has changed hands: what was read through it may be anybody's."""


@dataclass
class _Entry:
    generation: int
    index: HeadIndex
    lock: threading.Lock = field(default_factory=threading.Lock)


class Indexes:
    """Safe for several threads.

    Args:
        layout, views: the shared file of the rank. actor: which share of the KV heads. by_faiss: see HeadIndex.

    Attributes:
        heads: of the share. source: the pages. calls: how many there were of :meth:`call`.
    """

    def __init__(self, layout: Layout, views: Views, actor: int, by_faiss: bool = False) -> None:
        self._layout, self._views, self._by_faiss = layout, views, by_faiss
        self.heads = list(range(actor, layout.kv_heads, layout.actors))
        owner = int(views.words[WORD_CLIENT_PID]) if layout.pages_at else 0
        self.source: Source = source_of(views.pages, layout.dtype_code, owner, layout.pages_at)
        self._entries: dict[Key, _Entry] = {}
        self._wanted: dict[int, tuple[int, int]] = {}
        self.calls = 0
        self._called = threading.Condition()

    def row_base(self, layer: int, head: int) -> int:
        """Element of the first row of a layer and KV head in page 0."""
        return layer * self._layout.layer_elements + head * self._layout.head_elements

    def ready(self, key: Key, generation: int, tokens: int) -> HeadIndex:
        """The index over host tokens ``[0, tokens)`` of a page table's owner; made as far as it is not there yet.

        Raises:
            RequestGone: the table is another's by now.
        """
        entry = self._entries.get(key)
        if entry is None or entry.generation != generation:
            self._check(key[0], generation)
            fresh = _Entry(generation, HeadIndex(self._space(key), self._by_faiss))
            if entry is not None:
                self._entries.pop(key, None)
            entry = self._entries.setdefault(key, fresh)
            if entry.generation != generation:
                raise RequestGone
        if entry.index.size < tokens:
            with entry.lock:
                self._extend(key, entry, tokens)
        return entry.index

    def _space(self, key: Key) -> Any:
        slot, layer, head = key
        if int(self._views.slots[slot, SLOT_SPACE]) == LEARNED:
            return self._views.learned_space(layer, head)
        return rotated(1, self._layout.dim).one(0)

    def _extend(self, key: Key, entry: _Entry, tokens: int) -> None:
        lay, index = self._layout, entry.index
        slot, layer, head = key
        held = copies(lay.dim, lay.dtype_code)
        while index.size < tokens:
            count = min(_PIECE, tokens - index.size)
            keys = np.empty((count, lay.dim), np.float32)
            last = index.size + count
            table = self._views.tables[slot, : lay.page_tokens_owned(last)].copy()
            self._check(slot, entry.generation)
            if table.min() < 0 or table.max() >= lay.pages:
                raise RequestGone
            pages = np.array((lay.page_tokens, lay.page_elements))
            if not load_paged_keys(self.source, table, pages, self.row_base(layer, head), index.size, held, keys):
                raise OSError("retrieval: the memory of the serving process can not be read")
            self._check(slot, entry.generation)
            index.append(keys)

    def _check(self, slot: int, generation: int) -> None:
        full_fence()
        if int(self._views.slots[slot, SLOT_GENERATION]) != generation:
            raise RequestGone

    def want(self, slot: int, generation: int, tokens: int) -> None:
        """A step asks for these tokens, which have arrived: to be indexed in all layers, by all threads that do, before
        the message of each layer comes."""
        with self._called:
            if self._wanted.get(slot) != (generation, tokens):
                self._wanted[slot] = generation, tokens
                self.call()

    def call(self) -> None:
        """Wake who waits in :meth:`await_call`."""
        with self._called:
            self.calls += 1
            self._called.notify_all()

    def await_call(self, known: int, timeout_s: float) -> int:
        """Wait until there were other than ``known`` calls, or for so long; returns how many there were."""
        with self._called:
            if self.calls == known:
                self._called.wait(timeout_s)
            return self.calls

    def live(self) -> list[tuple[int, int, int]]:
        """Page tables in use, their generations, and the tokens that may be indexed; first those that a step waits
        for."""
        slots, first, others = self._views.slots, [], []
        with self._called:
            wanted = dict(self._wanted)
        for slot in np.flatnonzero(slots[:, SLOT_GENERATION]).tolist():
            generation, tokens = int(slots[slot, SLOT_GENERATION]), int(slots[slot, SLOT_INDEXED])
            owner, asked = wanted.get(slot, (0, 0))
            if owner == generation and asked > tokens:
                first.append((slot, generation, asked))
            else:
                others.append((slot, generation, tokens))
        return first + others

    def missing(self, key: Key, generation: int, tokens: int) -> bool:
        """Whether :meth:`ready` would have work to do."""
        entry = self._entries.get(key)
        return tokens > 0 and (entry is None or entry.generation != generation or entry.index.size < tokens)

    def drop_stale(self) -> None:
        """Forget the indexes of requests that are over."""
        with self._called:
            for slot, (generation, _) in list(self._wanted.items()):
                if int(self._views.slots[slot, SLOT_GENERATION]) != generation:
                    del self._wanted[slot]
        for key, entry in list(self._entries.items()):
            if int(self._views.slots[key[0], SLOT_GENERATION]) != entry.generation:
                self._entries.pop(key, None)
