# SPDX-License-Identifier: Apache-2.0
"""The host arena of a rank: pages of K and V, given to requests and taken back by (request, epoch).

The scheduler has some kept for their prefix (core/prefixes.py): they stay when their request ends, and others share
them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_retrieval_attn.sketch.space import LEARNED, ROTATION
from vllm_retrieval_attn.store.code_pages import CodePages
from vllm_retrieval_attn.store.layout import (
    SLOT_GENERATION,
    SLOT_INDEXED,
    SLOT_SPACE,
    WORD_GROWTH,
    Layout,
)
from vllm_retrieval_attn.store.page_tensor import page_tensor
from vllm_retrieval_attn.store.requests import RequestStore
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Array, Views

logger = logging.getLogger("vllm.retrieval.memory")


SPACE_REACH = 2
"""How many times as long as the prompt that a space was learned from a request may be to be coded in it: rotary
embeddings turn keys on, and at four times the length the rotation alone does better (docs/index-study.md)."""


class ArenaFull(RuntimeError):
    """No page is left; the scheduler's ledger should have prevented it."""


@dataclass
class KeptPage:
    """Attributes:
    page: of the arena. code: its page of the sketch; None: it lost its codes. space: which space made them.
    """

    page: int
    code: int | None
    space: int


class Arena:
    """Pages, page tables and the requests that own them. Used by the vLLM worker's main thread.

    Args:
        layout: shapes. rank: tensor-parallel rank, part of the file's name.
        poison: overwrite freed pages with NaN (tests). sinks: tokens of a prompt's sinks, and pages at
            the arena's end that hold them. memory: bytes of the pages, where layout.pages_at tells.

    Attributes:
        pages: (pages, layers, kv_heads, page_tokens, 2, dim) tensor over the shared file, or over ``memory``.
        queries: (max_rows, heads, dim) tensor over the shared file. outside: (max_rows, heads) float32.
        space: which space codes the tokens of requests that are opened from now on. space_tokens: tokens that it was
            learned from; requests of more than SPACE_REACH times as many are coded after the rotation.
        kept: pages that are kept for their prefix, by the scheduler's numbers.
        codes: pages of the sketch on the GPU; None where there is no sketch.
        uncoded: requests, ever, that the sketch had no room for.
        filled: every page holds synthetic K and V that requests may count on (bench/fill.py).
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        rank: int,
        poison: bool = False,
        sinks: tuple[int, int] = (0, 0),
        memory: Array | None = None,
    ) -> None:
        self.layout = layout
        self.file = SharedFile.create(layout.file_bytes, rank)
        self.views = Views(layout, self.file.map, memory)
        lay = layout
        self.pages = page_tensor(layout, self.views, dtype)
        self.queries = torch.from_numpy(self.views.queries).view(dtype).view(lay.max_rows, lay.heads, lay.dim)
        self.outside = torch.from_numpy(self.views.outside)
        self._poison = poison
        self.sinks, self._sink_pages = sinks
        # Low numbers first: memory is touched late.
        self._free = list(range(layout.pages - self._sink_pages - 1, -1, -1))
        self._slots = list(range(layout.max_rows - 1, -1, -1))
        self._generation = 0
        self._users: Counter[int] = Counter()
        self.kept: dict[int, KeptPage] = {}
        self.space, self.space_tokens = 0, 0
        self.codes: CodePages | None = None
        self._coded = 0
        self.filled = False
        self.uncoded = 0
        self.requests: dict[str, RequestStore] = {}
        self.before_open: Callable[[], None] | None = None
        self.before_release: Callable[[RequestStore], None] | None = None

    @property
    def used_pages(self) -> int:
        """Pages that live requests own."""
        kept = Counter(kept.page for kept in self.kept.values())
        return sum(users > kept[page] for page, users in self._users.items())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of pages that requests can own."""
        return (self.layout.pages - self._sink_pages) * self.layout.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that live requests own."""
        return self.used_pages * self.layout.page_bytes

    @property
    def host_tokens(self) -> int:
        """Tokens written to the arena and still owned by live requests."""
        return sum(store.tokens for store in self.requests.values())

    @property
    def indexed_tokens(self) -> int:
        """Host tokens of live requests that are, or are about to be, searched through the index."""
        return sum(int(self.views.slots[store.slot, SLOT_INDEXED]) for store in self.requests.values())

    def open(self, request_id: str, epoch: int, longest: int = 0) -> RequestStore:
        """The store of an admission of ``longest`` tokens at most; a store of an older epoch is released first."""
        store = self.requests.get(request_id)
        if store is not None and store.epoch == epoch:
            return store
        if store is not None:
            self.release(request_id, store.epoch)
        if not self._slots:
            raise ArenaFull(f"more than {self.layout.max_rows} requests hold host memory")
        if self.before_open is not None:
            self.before_open()
        self._generation += 1
        store = RequestStore(request_id, epoch, self._slots.pop(), self._generation)
        store.sketched, store.space = self.codes is not None, self.space
        if store.space == LEARNED and longest > SPACE_REACH * self.space_tokens:
            store.space = ROTATION
        slot = self.views.slots[store.slot]
        slot[SLOT_INDEXED], slot[SLOT_SPACE] = 0, store.space
        slot[SLOT_GENERATION] = store.generation
        self.requests[request_id] = store
        return store

    def grow(self, store: RequestStore, tokens: int) -> None:
        """Give ``store`` the pages for host tokens ``[0, tokens)``."""
        need = self.layout.page_tokens_owned(tokens)
        while len(store.pages) < need:
            if not self._free:
                raise ArenaFull(f"host arena is full ({self.layout.pages} pages of {self.layout.page_tokens} tokens)")
            page = self._free.pop()
            self._users[page] = 1
            self.views.tables[store.slot, len(store.pages)] = page
            store.pages.append(page)
        if store.sketched:
            assert self.codes is not None
            before = len(store.codes)
            if self._coded + need - before > self.codes.together or not self._grow_codes(store.codes, need):
                self._lose_codes(store)
            else:
                self._coded += max(0, need - before)

    def _grow_codes(self, held: list[int], need: int) -> bool:
        """As CodePages.grow; pages that are kept and that nobody uses lose their codes for it."""
        assert self.codes is not None
        if self.codes.grow(held, need):
            return True
        for kept in self.kept.values():
            if kept.code is not None and self._users[kept.page] == 1:
                self.codes.release([kept.code])
                kept.code = None
                if self.codes.grow(held, need):
                    return True
        return False

    def _lose_codes(self, store: RequestStore) -> None:
        """A request's host tokens are searched by the CPU workers from now on."""
        assert self.codes is not None
        self._coded -= len(store.codes)
        self.codes.release(store.codes)
        store.sketched = False
        self.uncoded += 1

    def spare_codes(self) -> int:
        """Pages of the sketch that requests may still get."""
        assert self.codes is not None
        return min(self.codes.pages - self.used_codes(), self.codes.together - self._coded)

    def used_codes(self) -> int:
        """Pages of the sketch that live requests have."""
        assert self.codes is not None
        idle = sum(kept.code is not None and self._users[kept.page] == 1 for kept in self.kept.values())
        return self.codes.used - idle

    # ---- pages kept for their prefix

    def keep(self, store: RequestStore, index: int, number: int) -> None:
        """The page at ``index`` of a request is kept under ``number``."""
        page = store.pages[index]
        code = store.codes[index] if store.sketched else None
        self.kept[number] = KeptPage(page, code, store.space)
        self._users[page] += 1
        if code is not None and self.codes is not None:
            self.codes.share([code])

    def drop(self, number: int) -> None:
        """A page is kept no longer."""
        kept = self.kept.pop(number)
        if kept.code is not None and self.codes is not None:
            self.codes.release([kept.code])
        self._leave([kept.page])

    def adopt(self, store: RequestStore, numbers: Sequence[int]) -> list[int]:
        """A request that holds nothing yet begins with kept pages. All its codes have to be of one space: that of the
        first page that has any. Returns the indexes of pages whose codes are to be made, of the request's ``codes``."""
        mine = [self.kept[number] for number in numbers]
        store.pages = [kept.page for kept in mine]
        self._users.update(store.pages)
        self.views.tables[store.slot, : len(mine)] = store.pages
        spaces = [kept.space for kept in mine if kept.code is not None]
        if not store.sketched or self.codes is None:
            return []
        if spaces:
            store.space = self.views.slots[store.slot, SLOT_SPACE] = spaces[0]
        fitting = [kept.code if kept.space == store.space else None for kept in mine]
        self.codes.share(code for code in fitting if code is not None)
        fresh: list[int] = []
        missing = [index for index, code in enumerate(fitting) if code is None]
        store.codes, shared = [], [code for code in fitting if code is not None]
        if self._coded + len(mine) > self.codes.together or not self._grow_codes(fresh, len(missing)):
            self.codes.release(shared)
            self._lose_codes(store)
            return []
        self._coded += len(mine)
        for index, code in zip(missing, fresh, strict=True):
            fitting[index] = code
            if mine[index].code is None:
                mine[index].code, mine[index].space = code, store.space
                self.codes.share([code])
        store.codes = [code for code in fitting if code is not None]
        return missing

    def sink_places(self, slot: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Page and offset of sink tokens ``[first, last)`` in a slot of ``sinks`` tokens, both int64."""
        at = slot * self.sinks + np.arange(first, last)
        base = self.layout.pages - self._sink_pages
        return base + at // self.layout.page_tokens, at % self.layout.page_tokens

    def _leave(self, pages: Sequence[int]) -> None:
        """Pages have a user less; what has none is free."""
        free = []
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                free.append(page)
        if self._poison and free:
            self.pages[free] = torch.nan
        self._free.extend(free)

    # ---- indexes, and the end

    def allow_indexing(self, store: RequestStore, tokens: int) -> None:
        """Let the actors index host tokens ``[0, tokens)``, which must have arrived in the arena."""
        slot = self.views.slots[store.slot]
        if tokens > slot[SLOT_INDEXED]:
            slot[SLOT_INDEXED] = tokens
            self.views.words[WORD_GROWTH] += 1

    def release(self, request_id: str, epoch: int) -> None:
        """Take back what the admission ``epoch`` of a request holds; anything newer stays."""
        store = self.requests.get(request_id)
        if store is None or store.epoch > epoch:
            return
        del self.requests[request_id]
        if self.before_release is not None:
            self.before_release(store)
        self.views.slots[store.slot, SLOT_GENERATION] = 0
        self.views.words[WORD_GROWTH] += 1  # its indexes can go
        if self._poison:
            self.views.tables[store.slot] = -(1 << 40)
        if self.codes is not None:
            self._coded -= len(store.codes)
            self.codes.release(store.codes)
        self._leave(store.pages)
        self._slots.append(store.slot)

    def token_positions(self, store: RequestStore, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Page number and offset within it of host tokens ``[first, last)``, both int64."""
        tokens = np.arange(first, last)
        pages = np.asarray(store.pages, np.int64)[tokens // self.layout.page_tokens]
        return pages, tokens % self.layout.page_tokens

    def close(self) -> None:
        self.requests.clear()
        self.file.close()
