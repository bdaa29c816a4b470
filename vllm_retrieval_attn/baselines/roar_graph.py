# SPDX-License-Identifier: Apache-2.0
"""The graph of RoarGraph (arXiv 2408.08933): made with exact neighbours, searched best-first.

Numba kernels; they release the GIL. Keys for building are float32; searches read rows as they are stored.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import Floats
from vllm_retrieval_attn.index.rows import jit, load

DEGREE = 32
"""M: links that a key may get by projection, and as many again to keys near it (the authors use 35)."""
QUERY_NEIGHBOURS = 100
"""Keys that a query is joined to in the bipartite graph, N_q of the paper."""
ENTRIES = 4
"""Keys where every search starts."""


@dataclass
class Graph:
    """Key-key links in compressed rows: key i links to ``links[starts[i]:starts[i + 1]]``.

    Attributes:
        starts: (n + 1,) int64. links: (edges,) int32. entries: (e,) int64.
    """

    starts: npt.NDArray[np.int64]
    links: npt.NDArray[np.int32]
    entries: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.links.nbytes + self.entries.nbytes


def make_graph(keys: Floats, queries: Floats) -> Graph:
    """Project the query-key graph onto ``keys`` (n, d) float32, then connect it: section 4 of the paper.

    ``queries`` (m, d) float32, not empty, are pooled over the query heads that share the KV head. Where the paper
    searches its graph for the neighbours of a key, we take the exact ones by distance: n^2 d products, nothing to tune.
    """
    n = len(keys)
    _, near = faiss.knn(queries, keys, min(QUERY_NEIGHBOURS, n), metric=faiss.METRIC_INNER_PRODUCT)
    table = np.empty((n, 2 * DEGREE), np.int32)
    degree = np.zeros(n, np.int32)
    project(near.astype(np.int32), keys, DEGREE, table, degree)
    _, around = faiss.knn(keys, keys, min(DEGREE + 1, n))  # a key is among its own neighbours
    connect(around.astype(np.int32), keys, DEGREE, table, degree)
    entries = np.argsort(-(keys @ queries.mean(axis=0)))[:ENTRIES]
    bridges = bridge(table, degree, around.astype(np.int32), entries)
    filled = np.arange(2 * DEGREE) < degree[:, None]
    sources = np.concatenate((np.nonzero(filled)[0], bridges[:, 0]))
    links = np.concatenate((table[filled], bridges[:, 1].astype(np.int32)))
    starts = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(sources, minlength=n), out=starts[1:])
    return Graph(starts, links[np.argsort(sources, kind="stable")], entries)


@jit
def distance(a: Any, b: Any) -> Any:
    """Squared Euclidean distance of two (d,) vectors."""
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        x = a[j] - b[j]
        total += x * x
    return total


@jit
def select(key: Any, others: Any, keys: Any, limit: int, fill: bool, out: Any) -> int:
    """Choose up to ``limit`` links of ``key`` among the distinct keys ``others`` (c,) into ``out``; returns how many.

    The rule of relative neighbourhood graphs: from near to far, leave out what is closer to a link already chosen
    than to ``key``. ``fill`` tops up with the nearest left out.
    """
    count = others.shape[0]
    apart, order = np.empty(count, np.float32), np.empty(count, np.int64)
    for c in range(count):  # sorted by insertion: np.argsort would take seconds to compile
        new = distance(keys[key], keys[others[c]])
        apart[c] = new
        at = c
        while at and apart[order[at - 1]] > new:
            order[at] = order[at - 1]
            at -= 1
        order[at] = c
    left = np.empty(count, np.int64)
    chosen = skipped = 0
    for rank in range(count):
        if chosen == limit:
            break
        c = order[rank]
        other = np.int64(others[c])
        hidden = other == key
        for s in range(chosen):
            if hidden:
                break
            hidden = distance(keys[other], keys[out[s]]) < apart[c]
        if not hidden:
            out[chosen] = other
            chosen += 1
        elif other != key:
            left[skipped] = other
            skipped += 1
    if fill:
        for s in range(min(skipped, limit - chosen)):
            out[chosen] = left[s]
            chosen += 1
    return chosen


@jit
def add(source: int, target: int, limit: int, table: Any, degree: Any) -> bool:
    """Link ``source`` to ``target`` unless it has ``limit`` links; says whether the link is there."""
    count = degree[source]
    for s in range(count):
        if table[source, s] == target:
            return True
    if count == limit:
        return False
    table[source, count] = target
    degree[source] = count + 1
    return True


@jit
def project(near: Any, keys: Any, limit: int, table: Any, degree: Any) -> None:
    """Neighbourhood-aware projection: each query's nearest key becomes the hub of its other neighbours, both ways.

    Args:
        near: (m, N_q) int32 nearest keys of each query, best first.
        table, degree: (n, 2 * limit) and (n,) int32 links made; at most ``limit`` a key.
    """
    others = np.empty(near.shape[1] + table.shape[1], np.int32)
    seen = np.zeros(keys.shape[0], np.bool_)
    for t in range(near.shape[0]):
        hub = np.int64(near[t, 0])
        count = 0
        for s in range(degree[hub]):  # what earlier queries joined to this hub
            others[count] = table[hub, s]
            seen[others[count]] = True
            count += 1
        for s in range(1, near.shape[1]):
            if not seen[near[t, s]]:
                others[count] = near[t, s]
                count += 1
        for s in range(count):
            seen[others[s]] = False
        degree[hub] = select(hub, others[:count], keys, limit, True, table[hub])
        for s in range(degree[hub]):
            other = np.int64(table[hub, s])
            if not add(other, hub, limit, table, degree):
                for old in range(limit):
                    others[old] = table[other, old]
                others[limit] = hub
                degree[other] = select(other, others[: limit + 1], keys, limit, True, table[other])


@jit
def connect(around: Any, keys: Any, limit: int, table: Any, degree: Any) -> None:
    """Connectivity enhancement: link each key both ways to a selection of its nearest keys, where there is room.

    Args:
        around: (n, c) int32 nearest keys of each key.
    """
    chosen = np.empty(limit, np.int32)
    for key in range(keys.shape[0]):
        for s in range(select(key, around[key], keys, limit, False, chosen)):
            other = np.int64(chosen[s])
            add(key, other, table.shape[1], table, degree)
            add(other, key, table.shape[1], table, degree)


@jit
def bridge(table: Any, degree: Any, around: Any, entries: Any) -> Any:
    """Links to add so that every key can be reached from the entries: (b, 2) int64 sources and targets.

    A key that cannot gets one from the nearest of its neighbours that can, or from an entry.
    """
    n = degree.shape[0]
    reached = np.zeros(n, np.bool_)
    stack = np.empty(n, np.int64)
    found = np.empty((n, 2), np.int64)
    bridges = 0
    waiting = entries.shape[0]
    for s in range(waiting):
        stack[s] = entries[s]
        reached[entries[s]] = True
    for key in range(-1, n):
        if key >= 0:
            if reached[key]:
                continue
            source = entries[0]
            for s in range(around.shape[1]):
                if reached[around[key, s]]:
                    source = np.int64(around[key, s])
                    break
            found[bridges, 0], found[bridges, 1] = source, key
            bridges += 1
            reached[key] = True
            stack[0] = key
            waiting = 1
        while waiting:
            waiting -= 1
            here = stack[waiting]
            for s in range(degree[here]):
                other = table[here, s]
                if not reached[other]:
                    reached[other] = True
                    stack[waiting] = other
                    waiting += 1
    return found[:bridges]


@jit
def push(scores: Any, rows: Any, size: int, score: Any, row: int) -> None:
    """Add to the binary heap of ``size`` items in ``scores`` and ``rows``; the least score is on top."""
    at = size
    while at:
        up = (at - 1) >> 1
        if scores[up] <= score:
            break
        scores[at], rows[at] = scores[up], rows[up]
        at = up
    scores[at], rows[at] = score, row


@jit
def pop(scores: Any, rows: Any, size: int) -> None:
    """Take the top off the heap; ``size`` items stay."""
    score, row = scores[size], rows[size]
    at = 0
    while True:
        down = 2 * at + 1
        if down >= size:
            break
        if down + 1 < size and scores[down + 1] < scores[down]:
            down += 1
        if score <= scores[down]:
            break
        scores[at], rows[at] = scores[down], rows[down]
        at = down
    scores[at], rows[at] = score, row


@jit
def best_first(memory: Any, starts: Any, links: Any, entries: Any, query: Any, width: int) -> tuple[Any, Any, int]:
    """Search the graph with a pool of ``width`` keys: expand the best key not yet expanded while it is in the pool.

    Args:
        memory: Memory of rows, keys beside values, from element 0 on (index/rows.py).
        query: (d,) float32.

    Returns:
        (v,) int64 all rows scored and (v,) float32 their inner products, and the number of links read. The pool at the
        end is the ``width`` best of them.
    """
    n, dim = starts.shape[0] - 1, query.shape[0]
    seen = np.zeros(n, np.bool_)
    rows, scores = np.empty(n, np.int64), np.empty(n, np.float32)
    open_scores, open_rows = np.empty(n, np.float32), np.empty(n, np.int64)  # negated: the best is on top
    pool_scores, pool_rows = np.empty(width + 1, np.float32), np.empty(width + 1, np.int64)
    key = np.empty(dim, np.float32)
    visited = waiting = pooled = read = 0
    first, last = 0, entries.shape[0]
    here = np.int64(-1)
    while True:
        for s in range(first, last):
            row = entries[s] if here < 0 else np.int64(links[s])
            if seen[row]:
                continue
            seen[row] = True
            load(memory, row * 2 * dim, dim, key)
            score = np.float32(0.0)
            for j in range(dim):
                score += query[j] * key[j]
            rows[visited], scores[visited] = row, score
            visited += 1
            if pooled == width and score <= pool_scores[0]:
                continue
            push(pool_scores, pool_rows, pooled, score, row)
            pooled += 1
            if pooled > width:
                pooled = width
                pop(pool_scores, pool_rows, pooled)
            push(open_scores, open_rows, waiting, -score, row)
            waiting += 1
        if not waiting or (pooled == width and -open_scores[0] < pool_scores[0]):
            return rows[:visited].copy(), scores[:visited].copy(), read
        here = open_rows[0]
        waiting -= 1
        pop(open_scores, open_rows, waiting)
        first, last = starts[here], starts[here + 1]
        read += last - first
