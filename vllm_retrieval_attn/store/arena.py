"""The host arena of a rank: pages of K and V, given to requests and taken back by (request, epoch)."""

import logging
from collections.abc import Callable

import numpy as np
import torch

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

logger = logging.getLogger("vllm.retrieval")


class ArenaFull(RuntimeError):
    """No page is left; the scheduler's ledger should have prevented it."""


class Arena:
    """Pages, page tables and the requests that own them. Used by the vLLM worker's main thread.

    Args:
        layout: shapes. rank: tensor-parallel rank, part of the file's name.
        poison: overwrite freed pages with NaN (tests). memory: bytes of the pages, where layout.pages_at tells.

    Attributes:
        pages: (pages, layers, kv_heads, page_tokens, 2, dim) tensor over the shared file, or over ``memory``.
        queries: (max_rows, heads, dim) tensor over the shared file. outside: (max_rows, heads) float32.
        space: which space codes the tokens of requests that are opened from now on.
        codes: pages of the sketch on the GPU; None where there is no sketch.
        uncoded: requests, ever, that the sketch had no room for.
        filled: every page holds synthetic K and V that requests may count on (bench/fill.py).
    """

    def __init__(
        self, layout: Layout, dtype: torch.dtype, rank: int, poison: bool = False, memory: Array | None = None
    ) -> None:
        self.layout = layout
        self.file = SharedFile.create(layout.file_bytes, rank)
        self.views = Views(layout, self.file.map, memory)
        lay = layout
        self.pages = page_tensor(layout, self.views, dtype)
        self.queries = torch.from_numpy(self.views.queries).view(dtype).view(lay.max_rows, lay.heads, lay.dim)
        self.outside = torch.from_numpy(self.views.outside)
        self._poison = poison
        self._free = list(range(layout.pages - 1, -1, -1))  # low numbers first: memory is touched late
        self._slots = list(range(layout.max_rows - 1, -1, -1))
        self._generation = 0
        self.space = 0
        self.codes: CodePages | None = None
        self.filled = False
        self.uncoded = 0
        self.requests: dict[str, RequestStore] = {}
        self.before_open: Callable[[], None] | None = None
        self.before_release: Callable[[RequestStore], None] | None = None

    @property
    def used_pages(self) -> int:
        return self.layout.pages - len(self._free)

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

    def open(self, request_id: str, epoch: int) -> RequestStore:
        """The store of an admission; a store of an older epoch is released first."""
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
        slot = self.views.slots[store.slot]
        slot[SLOT_INDEXED], slot[SLOT_SPACE] = 0, self.space
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
            self.views.tables[store.slot, len(store.pages)] = page
            store.pages.append(page)
        if store.sketched:
            assert self.codes is not None
            if not self.codes.grow(store.codes, need):
                self.codes.release(store.codes)
                store.sketched = False
                self.uncoded += 1

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
            self.pages[store.pages] = torch.nan
        if self.codes is not None:
            self.codes.release(store.codes)
        self._free.extend(reversed(store.pages))
        self._slots.append(store.slot)

    def token_positions(self, store: RequestStore, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Page number and offset within it of host tokens ``[first, last)``, both int64."""
        tokens = np.arange(first, last)
        pages = np.asarray(store.pages, np.int64)[tokens // self.layout.page_tokens]
        return pages, tokens % self.layout.page_tokens

    def close(self) -> None:
        self.requests.clear()
        self.file.close()
