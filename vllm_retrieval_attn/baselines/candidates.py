# SPDX-License-Identifier: Apache-2.0
"""What the baselines share: find candidate rows by some structure, attend exactly over them, count what was read."""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import AttentionIndex, Floats, Rows
from vllm_retrieval_attn.index.rows import attend_exactly

SMALL = 64
"""Rows below which no structure is kept and everything is exact: two lists of `ivf`, one key's links in a graph."""
PROMPT_QUERIES = 2048
"""Prompt queries kept for building, spread evenly over the heads."""
CALIBRATION_QUERIES = 32
"""Queries that the map from budget to effort is measured with."""

_counting = threading.Lock()  # of the module, so that an index can still be pickled


@dataclass
class Cost:
    """Keys scored by one call, summed over queries, and bytes read beside keys and values (centroids, edges)."""

    keys: int
    structure_bytes: int


@dataclass(frozen=True)
class Effort:
    """Mean keys scored per query at some widths of a graph search; both ascending, float64 (steps,)."""

    widths: npt.NDArray[np.float64]
    keys: npt.NDArray[np.float64]

    @classmethod
    def calibrate(cls, scored: Callable[[int], float], n: int) -> "Effort":
        """Measure ``scored(width)``, mean keys scored per query, at widths 1, 2, 4 ... until it sees most of n rows."""
        widths, keys = [1], [scored(1)]
        while widths[-1] < n and keys[-1] < 0.9 * n:
            widths.append(min(2 * widths[-1], n))
            keys.append(scored(widths[-1]))
        return cls(np.array(widths, float), np.maximum.accumulate(np.array(keys, float)))

    def width(self, keys: float) -> int:
        """The widest search that is expected to score ``keys`` keys; at least 1, which may score more."""
        return max(1, int(np.interp(keys, self.keys, self.widths)))


def spread(vectors: npt.NDArray[Any], count: int) -> Floats:
    """At most ``count`` of (n, d) vectors, evenly spaced, as contiguous float32."""
    if len(vectors) > count:
        vectors = vectors[np.linspace(0, len(vectors) - 1, count).astype(np.int64)]
    return np.ascontiguousarray(vectors, np.float32)


def attend_candidates(
    rows: npt.NDArray[Any], queries: Floats, found: list[Rows], scale: float
) -> tuple[Floats, Floats]:
    """Exact attention of each of ``queries`` (g, d) over its own row numbers ``found`` of ``rows`` (n, 2, d).

    Returns:
        (g, d) output and (g,) natural log-sum-exp; zeros and -inf for a query without rows.
    """
    out = np.empty(queries.shape, np.float32)
    lse = np.empty(len(queries), np.float32)
    for i, numbers in enumerate(found):
        out[i], lse[i] = (x[0] for x in attend_exactly(rows[numbers], queries[i : i + 1], scale))
    return out, lse


def best_of(scores: list[Floats], rows: list[Rows], k: int) -> tuple[Floats, Rows]:
    """(len, k) best scores, descending, and their rows of one list a query; -inf and -1 where a list has fewer."""
    best = np.full((len(scores), k), -np.inf, np.float32)
    numbers = np.full((len(scores), k), -1, np.int64)
    for i, (score, row) in enumerate(zip(scores, rows, strict=True)):
        top = np.argpartition(-score, k)[:k] if len(score) > k else np.arange(len(score))
        top = top[np.argsort(-score[top], kind="stable")]
        best[i, : len(top)], numbers[i, : len(top)] = score[top], row[top]
    return best, numbers


class CandidateIndex(AttentionIndex):
    """Base of the kinds that look at some keys and give exact weight to those they keep.

    A budget of 1 or more, and an index of fewer than SMALL rows, is brute force: nothing of the structure is read.
    """

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> None:
        super().__init__(scale, dim, dtype)
        self.built = 0
        """Rows that the structure was made of when it was last made from nothing; 0 while there is none."""
        self.prompt: Floats = np.empty((0, dim), np.float32)
        """(m, d) prompt queries of all heads that share the KV head, at most PROMPT_QUERIES."""

    @abstractmethod
    def _make(self) -> None:
        """Make the structure anew from all rows (at least SMALL)."""

    @abstractmethod
    def _extend(self, first: int) -> None:
        """Take rows from number ``first`` on into the structure."""

    @abstractmethod
    def _best(self, queries: Floats, k: int, budget: float) -> tuple[Floats, Rows, Cost]:
        """(g, k) raw inner products, descending, and rows of the best keys scored; -inf and -1 where fewer."""

    @abstractmethod
    def _candidates(self, queries: Floats, budget: float) -> tuple[list[Rows], Cost]:
        """Rows to attend over, one array a query."""

    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        self.rows = np.stack((keys, values), axis=1).astype(self.rows.dtype)
        self.prompt = spread(queries.reshape(-1, self.dim), PROMPT_QUERIES) if queries.size else self.prompt[:0]
        self.built = 0
        self._grow(0)

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        first = self.size
        self.rows = np.concatenate((self.rows, np.stack((keys, values), axis=1).astype(self.rows.dtype)))
        self._grow(first)

    def search(self, queries: Floats, k: int, budget: float = 1.0) -> tuple[Floats, Rows]:
        queries = np.ascontiguousarray(queries, np.float32)
        if self._exact(budget):
            scores, rows = faiss.knn(queries, self._keys(0), k, metric=faiss.METRIC_INNER_PRODUCT)
            scores[rows < 0] = -np.inf
            cost = Cost(len(queries) * self.size, 0)
        else:
            scores, rows, cost = self._best(queries, k, budget)
        self._count(len(queries), cost, 0)
        return scores * np.float32(self.scale), rows

    def attend(self, queries: Floats, budget: float = 1.0) -> tuple[Floats, Floats]:
        queries = np.ascontiguousarray(queries, np.float32)
        if self._exact(budget):
            read = len(queries) * self.size
            self._count(len(queries), Cost(read, 0), read)
            return attend_exactly(self.rows, queries, self.scale)
        found, cost = self._candidates(queries, budget)
        self._count(len(queries), cost, sum(map(len, found)))
        return attend_candidates(self.rows, queries, found, self.scale)

    def attended(self, queries: Floats, budget: float = 1.0) -> list[Rows]:
        if self._exact(budget):
            return [np.arange(self.size)] * len(queries)
        return self._candidates(np.ascontiguousarray(queries, np.float32), budget)[0]

    def _grow(self, first: int) -> None:
        if self.built:
            self._extend(first)
        elif self.size >= SMALL:
            self._remake()

    def _remake(self) -> None:
        self._make()
        self.built = self.size

    def _exact(self, budget: float) -> bool:
        if budget <= 0:
            raise ValueError(f"budget must be above 0, not {budget}")
        return budget >= 1 or not self.built

    def _keys(self, first: int) -> Floats:
        """Keys from row ``first`` on as contiguous float32."""
        return np.ascontiguousarray(self.rows[first:, 0], np.float32)

    def _guides(self, count: int) -> Floats:
        """At most ``count`` prompt queries, or keys in their place if there are none."""
        return spread(self.prompt if len(self.prompt) else self.rows[:, 0], count)

    def _count(self, queries: int, cost: Cost, values: int) -> None:
        with _counting:
            self.touched.queries += queries
            self.touched.keys += cost.keys
            self.touched.bytes += cost.structure_bytes + (cost.keys + values) * self.dim * self.rows.itemsize
