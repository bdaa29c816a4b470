"""The kinds to compare with (`ivf`, `hnsw`, `roar`) behind the ring: index/ as it is, one index a segment and KV head.

For quality, not for speed: every message goes through Python and Faiss, and indexes live in the process, beside
``host_memory_gb``. What dies with the process is built again; until then its segments are scanned exactly.
"""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.index.base import AttentionIndex
from vllm_retrieval_attn.index.flat import attend_exactly
from vllm_retrieval_attn.index.kernels import FLOAT16
from vllm_retrieval_attn.index.registry import make_index
from vllm_retrieval_attn.store.layout import (
    JOB_GENERATION,
    JOB_SLAB,
    JOB_TABLE,
    MSG_LAYER,
    MSG_ROWS,
    ROW_BUDGET,
    ROW_INDEXED,
    ROW_Q,
    ROW_TABLE,
    ROW_TOKENS,
    STAT_CODES,
    STAT_KEYS,
    STAT_NS,
    WORD_STOP,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.builder import Job
from vllm_retrieval_attn.workers.lane import SLEEP, SLICE_NS, Lane
from vllm_retrieval_attn.workers.signals import await_message, finish_message
from vllm_retrieval_attn.workers.slab_work import segment_rows, torch_pages

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class LibraryIndexes:
    """The indexes of one actor's KV heads: what its builder makes and its lane searches.

    Args:
        layout, views: the shared file of the rank. actor: which share of the KV heads. kind: of index/registry.py.
        scale: softmax scale.
    """

    def __init__(self, layout: Layout, views: Views, actor: int, kind: str, scale: float) -> None:
        self.layout, self.views, self.scale = layout, views, scale
        self._kind = kind
        self.heads = list(range(actor, layout.kv_heads, layout.actors))
        self.pages = torch_pages(layout, views)
        self._found: dict[tuple[int, int, int], tuple[int, AttentionIndex]] = {}

    def build(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        """See workers/builder.py."""
        lay, views = self.layout, self.views
        table, slab = int(job[JOB_TABLE]), int(job[JOB_SLAB])
        rows = segment_rows(self.pages, pages, layer, self.heads).numpy()
        dtype = np.float16 if lay.dtype_code == FLOAT16 else np.float32
        for head, (keys, values) in zip(self.heads, rows, strict=True):
            sampled = (views.sample_lse[table, layer, head] > -np.inf).all(0)
            queries = np.ascontiguousarray(views.samples[table, layer, head][:, sampled])
            index = make_index(self._kind, self.scale, lay.dim, dtype)
            index.build(keys, values, queries)
            self._found[slab, layer, head] = int(job[JOB_GENERATION]), index

    def refresh(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        """These kinds have nothing that follows generation."""

    def parts(self, layer: int, head: int, row: Ints) -> Iterator[tuple[int, int, AttentionIndex | None]]:
        """The host tokens of a row in order, as (first, last, index); None where they are scanned exactly."""
        lay = self.layout
        tokens, slot = int(row[ROW_TOKENS]), int(row[ROW_TABLE])
        first = 0
        for segment in range(int(row[ROW_INDEXED])):
            offset = int(self.views.slab_tables[slot, segment]) - (lay.slabs_offset - lay.turns_offset)
            slab = offset // lay.segment_slab_bytes
            found = self._found.get((slab, layer, head))
            current = found is not None and found[0] == int(self.views.generations[slab])
            yield first, first + lay.segment_tokens, found[1] if found is not None and current else None
            first += lay.segment_tokens
        if first < tokens:
            yield first, tokens, None

    def rows_of(self, layer: int, head: int, slot: int, first: int, last: int) -> Floats:
        """(2, last - first, d) float32 keys and values of host tokens."""
        size = self.layout.page_tokens
        table = torch.from_numpy(self.views.tables[slot, first // size : -(-last // size)].copy())
        rows = segment_rows(self.pages, table, layer, [head])[0]
        found: Floats = rows[:, first % size :][:, : last - first].contiguous().numpy()
        return found

    def attend(self, layer: int, head: int, row: Ints, queries: Floats) -> tuple[Floats, Floats, int]:
        """Partial attention of the query heads of a KV head over a row's host tokens, and how many keys were scored.

        Args:
            queries: (group, d), unscaled.

        Returns:
            (group, d), (group,) natural log-sum-exp, and the count.
        """
        out, lse, scored = np.zeros_like(queries), np.full(len(queries), -np.inf, np.float32), 0
        budget = int(row[ROW_BUDGET]) * 1e-6
        for first, last, index in self.parts(layer, head, row):
            if index is None:
                part = self.rows_of(layer, head, int(row[ROW_TABLE]), first, last)
                more, more_lse = attend_exactly(part, queries, self.scale)
                scored += (last - first) * len(queries)
            else:
                more, more_lse = index.attend(queries, budget)
                scored += index.take_touched().keys
            both = np.logaddexp(lse, more_lse)
            safe = np.where(both > -np.inf, both, 0.0)  # nothing found yet
            out = out * np.exp(lse - safe)[:, None] + more * np.exp(more_lse - safe)[:, None]
            lse = both
        return out, lse, scored

    def attended(self, layer: int, head: int, row: Ints, queries: Floats) -> npt.NDArray[np.bool_]:
        """See workers/prober.py."""
        kept = np.zeros((len(queries), int(row[ROW_TOKENS])), np.bool_)
        for first, last, index in self.parts(layer, head, row):
            if index is None:
                kept[:, first:last] = True
                continue
            for mine, rows in zip(kept, index.attended(queries, int(row[ROW_BUDGET]) * 1e-6), strict=True):
                mine[first + rows] = True
        return kept


class LibraryLane(Lane):
    """The one lane of an actor: answers messages in Python, each (row, KV head) whole.

    Args:
        indexes: of the same actor. spin_ns: see workers/lane.py.
    """

    def __init__(self, indexes: LibraryIndexes, actor: int, spin_ns: int) -> None:
        super().__init__(indexes.layout, indexes.views, actor, 0, indexes.scale, spin_ns)
        self._indexes = indexes

    def _serve(self) -> None:
        words = self._views.words
        timeout = np.array(SLEEP, np.int64)
        slice_ns = 0
        for _ in self._while_client_lives():
            until = time.monotonic_ns() + slice_ns
            seq = await_message(words, words.ctypes.data, self._actor, self._spin_ns, until, timeout)
            slice_ns = SLICE_NS
            self.ready.set()
            if seq >= 0:
                self._answer()
                finish_message(words, words.ctypes.data, self._actor, seq)
            elif words[WORD_STOP]:
                return

    def _answer(self) -> None:
        lay, views, indexes = self._layout, self._views, self._indexes
        begin = time.monotonic_ns()
        layer = int(views.header[MSG_LAYER])
        queries = torch.from_numpy(views.queries).view(indexes.pages.dtype).view(lay.max_rows, lay.heads, lay.dim)
        scored = 0
        for r in range(int(views.header[MSG_ROWS])):
            row = views.rows[r].copy()
            for o, head in enumerate(indexes.heads):
                mine = queries[int(row[ROW_Q]), head * lay.group : (head + 1) * lay.group].float().numpy()
                out, lse, keys = indexes.attend(layer, head, row, mine)
                slot = views.partials[self._actor, r * len(indexes.heads) + o]
                slot[: lay.group * lay.dim] = out.reshape(-1)
                slot[lay.group * lay.dim :] = lse
                scored += keys
        views.stats[self._actor, STAT_NS] = time.monotonic_ns() - begin
        views.stats[self._actor, STAT_CODES], views.stats[self._actor, STAT_KEYS] = 0, scored
