"""`attention`: the default kind. Segments as index/segment.py lays them out, searched by index/search.py.

The served engine keeps the same slabs in shared memory and calls the same kernel (workers/ring.py).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.index.base import AttentionIndex, Floats, Rows
from vllm_retrieval_attn.index.build import Spaces, build_segment, make_spaces
from vllm_retrieval_attn.index.calibrate import calibrated_share
from vllm_retrieval_attn.index.dot import row_bytes
from vllm_retrieval_attn.index.flat import attend_exactly
from vllm_retrieval_attn.index.kernels import FLOAT16, FLOAT32, scratch
from vllm_retrieval_attn.index.search import COUNT_EXACT, COUNT_KEYS, MAX_NODES, Scratch, attend_nodes, offsets_of
from vllm_retrieval_attn.index.segment import HEAD_SHARE, SegmentShape

SEGMENT_TOKENS = 8192
RERANK = 800
CALIBRATION = 48
"""Prompt queries that the share to scan is calibrated with."""


def _spread(queries: torch.Tensor) -> torch.Tensor:
    """At most CALIBRATION of the queries (m, d), evenly spaced."""
    return queries[:: max(1, len(queries) // CALIBRATION)][:CALIBRATION]


class ClusteredIndex(AttentionIndex):
    """Clusters, codes, exact re-rank and tail over segments; what does not fill a segment is attended to exactly.

    Args:
        segment_tokens: keys of a segment. rerank: keys attended to exactly in a call. tail: estimate the rest.
    """

    kind = "attention"

    def __init__(
        self,
        scale: float,
        dim: int,
        dtype: npt.DTypeLike = np.float16,
        segment_tokens: int = SEGMENT_TOKENS,
        rerank: int = RERANK,
        tail: bool = True,
    ) -> None:
        super().__init__(scale, dim, dtype)
        self.shape = SegmentShape(segment_tokens, dim)
        self.rerank, self.tail = rerank, tail
        self.outside: npt.NDArray[Any] = np.empty((0, dim), dtype)
        """(k, d): keys attended to elsewhere (sinks, window); calibration counts their mass as kept."""
        self._moment: torch.Tensor | None = None
        self._spaces: Spaces | None = None
        self._slabs = np.empty(0, np.uint8)
        self._segments = 0
        self._samples = torch.empty(0, dim)

    @property
    def index_bytes(self) -> int:
        return self._segments * self.shape.bytes + self._turn_bytes * bool(self._segments)

    @property
    def _turn_bytes(self) -> int:
        return -(-self.dim * self.dim * 2 // 64) * 64

    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        self.rows = np.stack((keys, values)).astype(self.rows.dtype)
        flat = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).reshape(-1, queries.shape[-1])
        self._moment = (flat.mT @ flat / len(flat))[None] if len(flat) else None
        self._samples = _spread(flat)
        self._spaces, self._segments = None, 0
        self._slabs = np.empty(0, np.uint8)
        self._index_full_segments()

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        self.rows = np.concatenate((self.rows, np.stack((keys, values)).astype(self.rows.dtype)), axis=1)
        self._index_full_segments()

    def _index_full_segments(self) -> None:
        n = self.shape.tokens
        full = self.size // n
        if full == self._segments:
            return
        if self._spaces is None:
            first = torch.from_numpy(self.rows[0, : full * n].astype(np.float32))[None]
            moment = self._moment if self._moment is not None else first.mT @ first / first.shape[1]
            self._spaces = make_spaces(first, moment)
        slabs = np.zeros(self._turn_bytes + full * self.shape.bytes + 64, np.uint8)
        slabs = slabs[-slabs.ctypes.data % 64 :][: self._turn_bytes + full * self.shape.bytes]
        slabs[: len(self._slabs)] = self._slabs
        turn = self._spaces.to_queries.bfloat16().view(torch.uint8).numpy().reshape(-1)
        slabs[: len(turn)] = turn
        for number in range(self._segments, full):
            part = torch.from_numpy(self.rows[:, number * n : (number + 1) * n].astype(np.float32))
            begin = self._turn_bytes + number * self.shape.bytes
            slab = torch.from_numpy(slabs[begin : begin + self.shape.bytes])[None]
            build_segment(self.shape, part[:1], part[1:], self._spaces, torch.zeros(1), slab)
            self._calibrate(number, slab)
        self._slabs, self._segments = slabs, full

    def calibrate(self, queries: Floats) -> None:
        """Calibrate all segments anew with queries (g, m, d), unscaled, in place of the prompt's."""
        flat = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).reshape(-1, self.dim)
        self._samples = _spread(flat)
        for number in range(self._segments):
            begin = self._turn_bytes + number * self.shape.bytes
            self._calibrate(number, torch.from_numpy(self._slabs[begin : begin + self.shape.bytes])[None])

    def _calibrate(self, number: int, slab: torch.Tensor) -> None:
        """Put the calibrated share into a segment's slab (1, bytes), if there are queries to do it with."""
        if not len(self._samples):
            return
        assert self._spaces is not None
        n = self.shape.tokens
        keys = torch.from_numpy(self.rows[:1, number * n : (number + 1) * n].astype(np.float32))
        queries = self._samples[None] * self.scale
        seen = np.concatenate((self.rows[0], self.outside)).astype(np.float32)
        lse = (queries[0] @ torch.from_numpy(seen).T).logsumexp(1)[None]
        shares = calibrated_share(self.shape, slab, keys, self._spaces, queries, lse)
        slab[:, HEAD_SHARE * 8 : HEAD_SHARE * 8 + 8] = shares.double()[:, None].view(torch.uint8)

    def attend(self, queries: Floats, budget: float = 1.0) -> tuple[Floats, Floats]:
        """See the base class; ``budget`` 0 scans what was calibrated for each segment."""
        g = len(queries)
        if budget >= 1 or not self._segments:
            self._count(g, g * self.size, self.rows.nbytes)
            return attend_exactly(self.rows, queries, self.scale)
        counts = np.zeros(5, np.int64)
        out, lse = self._attend_segments(queries, budget, counts, np.empty(0, np.int64))
        rest = self.rows[:, self._segments * self.shape.tokens :]
        self._count(g, g * int(counts[COUNT_KEYS] + rest.shape[1]), self._bytes(counts) + rest.nbytes)
        more, more_lse = attend_exactly(rest, queries, self.scale)
        both = np.logaddexp(lse, more_lse)
        return out * np.exp(lse - both)[:, None] + more * np.exp(more_lse - both)[:, None], both

    def attended(self, queries: Floats, budget: float = 1.0) -> list[Rows]:
        return [self._chosen(queries, budget, np.zeros(5, np.int64))] * len(queries)

    def _chosen(self, queries: Floats, budget: float, counts: npt.NDArray[np.int64]) -> Rows:
        """Rows attended to exactly, the same for all queries of the group."""
        if budget >= 1 or not self._segments:
            return np.arange(self.size)
        chosen = np.empty(self.size, np.int64)
        self._attend_segments(queries, budget, counts, chosen)
        rest = np.arange(self._segments * self.shape.tokens, self.size)
        return np.concatenate((np.sort(chosen[: counts[COUNT_EXACT]]), rest))

    def search(self, queries: Floats, k: int, budget: float = 1.0) -> tuple[Floats, Rows]:
        counts = np.zeros(5, np.int64)
        rows = self._chosen(queries, budget, counts)
        rest = self.size - self._segments * self.shape.tokens * (budget < 1)
        scored = int(counts[COUNT_KEYS]) + rest
        self._count(len(queries), len(queries) * scored, self._bytes(counts) + rest * self.dim * self.rows.itemsize)
        keys = self.rows[0, rows].astype(np.float32)
        scores = queries @ keys.T * np.float32(self.scale)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = np.full((len(queries), k), -1, np.int64)
        values = np.full((len(queries), k), -np.inf, np.float32)
        found[:, : best.shape[1]] = rows[best]
        values[:, : best.shape[1]] = np.take_along_axis(scores, best, 1)
        return values, found

    def _bytes(self, counts: npt.NDArray[np.int64]) -> int:
        """Bytes that one query head read of slabs and rows."""
        nodes, leaves, keys, exact, values = (int(count) for count in counts)
        dim = self.dim
        return (
            nodes * (dim + 8)
            + leaves * (dim // 2 + 10)
            + keys * row_bytes(dim)
            + exact * (2 * dim * self.rows.itemsize + 2)
            + values * (dim + 4)
        )

    def _count(self, queries: int, keys: int, bytes_each: int) -> None:
        self.touched.queries += queries
        self.touched.keys += keys
        self.touched.bytes += queries * bytes_each

    def _attend_segments(
        self, queries: Floats, budget: float, counts: npt.NDArray[np.int64], chosen: Rows
    ) -> tuple[Floats, Floats]:
        """Attention over the indexed segments; ``counts`` and ``chosen`` as in index/search.py."""
        g, dim = queries.shape
        n = self.size
        raw = np.ascontiguousarray(self.rows).reshape(-1).view(np.uint8)
        kind = FLOAT16 if self.rows.itemsize == 2 else FLOAT32
        slabs = self._turn_bytes + np.arange(self._segments) * self.shape.bytes
        per_segment = self.shape.nodes
        nodes = self._segments * per_segment
        acc, top, total = np.zeros((g, dim), np.float32), np.full(g, -np.inf, np.float32), np.zeros(g, np.float32)
        scaled = np.ascontiguousarray(queries, np.float32) * np.float32(self.scale)
        work = Scratch(g, dim, min(nodes, MAX_NODES))
        memory = self._slabs
        for begin in range(0, nodes, MAX_NODES):
            end = min(nodes, begin + MAX_NODES)
            attend_nodes(
                memory.view(np.int8), memory.view(np.uint16), memory.view(np.float32), memory.view(np.float64),
                memory.ctypes.data, slabs, offsets_of(self.shape), per_segment, begin, end,
                raw.view(np.uint16), raw.view(np.float32), kind, np.zeros(1, np.int64), max(n, 1), 0, 0, n * dim,
                scaled, budget, max(1, self.rerank * (end - begin) // nodes), int(self.tail),
                acc, top, total, *scratch(g, dim), *work.arrays, counts, chosen,
            )  # fmt: skip
        return acc / total[:, None], top + np.log(total)
