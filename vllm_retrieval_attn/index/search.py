# SPDX-License-Identifier: Apache-2.0
"""Candidates of one query among the keys of a KV head: all that score above a threshold, by Faiss (index/native.py) or,
on processors that can, by a loop of our own over Faiss's codes (index/scan.py).

The threshold of a query head is the score that about ``candidates`` keys reach, estimated from every SAMPLE-th key
(index/shard.py). It depends on keys and query alone.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.native import pointer_to, search_above
from vllm_retrieval_attn.index.packing import SAMPLE
from vllm_retrieval_attn.index.rows import jit, prefetch
from vllm_retrieval_attn.index.scan import ScanScratch, scan_above, scan_scratch
from vllm_retrieval_attn.index.shard import SAMPLES, SHARD_TOKENS

MOST = 2048
"""Candidates of a query head that one shard gives at most: the best."""
_LINE = 16
"""float32 of a cache line."""


class Place(NamedTuple):
    """Where a shard lies.

    Attributes:
        faiss: address of Faiss's object. codes: address of what it scans, 0: Faiss is to search.
        mean, deviation: (d,) float32 of the shard.
    """

    faiss: int
    codes: int
    mean: npt.NDArray[np.float32]
    deviation: npt.NDArray[np.float32]


class SearchScratch(NamedTuple):
    """Memory of one thread.

    Attributes:
        best: (g, candidates / 64 + 2) float32. scores: (SAMPLES,) float32. scaled: (g, d + 1) float32, queries in a
            shard's scale. scan: of index/scan.py.
    """

    best: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    scaled: npt.NDArray[np.float32]
    scan: ScanScratch


def search_scratch(group: int, dim: int, candidates: int) -> SearchScratch:
    """Memory for ``group`` query heads that ask for about ``candidates`` keys each."""
    best, scaled = np.zeros((group, candidates // 64 + 2), np.float32), np.zeros((group, dim + 1), np.float32)
    return SearchScratch(best, np.zeros(SAMPLES, np.float32), scaled, scan_scratch(dim, SHARD_TOKENS))


@jit
def product(a: Any, b: Any) -> Any:
    """Inner product of two vectors."""
    total = np.float32(0.0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@jit
def turn(matrix: Any, query: Any, out: Any) -> None:
    """A query in the space of the codes."""
    for i in range(len(matrix)):
        out[i] = product(matrix[i], query)


@jit
def _sample_scores(part: Any, query: Any, scores: Any, ahead: Any, first: int, lines: int) -> None:
    """Scores (SAMPLES,) of a shard's samples (d, SAMPLES): sample beside sample, so that none waits for its sum.
    Meanwhile d times ``lines`` cache lines of the next shard's are fetched, from its element ``first`` on."""
    scores[:] = 0.0
    for j in range(len(query)):
        weight, row = query[j], part[j]
        for s in range(SAMPLES):
            scores[s] += weight * row[s]
        for line in range(j * lines, (j + 1) * lines):
            prefetch(ahead, first + line * _LINE)


@jit
def find_thresholds(samples: Any, keys: int, candidates: int, turned: Any, work: Any, out: Any) -> None:
    """The score that about ``candidates`` of ``keys`` keys reach, at most half of them, of each turned query (g, d),
    into ``out`` (g,). All queries of a KV head at once: the samples come from memory, which takes most of the time.

    Args:
        samples: (shards,) int64 addresses of the shards' samples. work: SearchScratch.
    """
    group, dim = turned.shape
    count = (keys + SAMPLE // 2 - 1) // SAMPLE
    wanted = max(1, min(candidates, keys // 2) * count // keys)
    best, scores = work.best, work.scores
    lines = (SAMPLES // _LINE + group - 1) // group
    for first in range(0, count, SAMPLES):
        shard = first // SAMPLES
        part = numba.carray(pointer_to(samples[shard]), (dim, SAMPLES), np.float32)
        ahead = numba.carray(pointer_to(samples[min(shard + 1, len(samples) - 1)]), (dim * SAMPLES,), np.float32)
        for i in range(group):
            _sample_scores(part, turned[i], scores, ahead, i * dim * lines * _LINE, lines)
            for s in range(min(SAMPLES, count - first)):
                score, held = scores[s], min(first + s, wanted)
                if held == wanted and not score > best[i, wanted - 1]:
                    continue
                place = held if held < wanted else wanted - 1
                while place > 0 and best[i, place - 1] < score:
                    best[i, place] = best[i, place - 1]
                    place -= 1
                best[i, place] = score
    for i in range(group):
        out[i] = best[i, wanted - 1]


@jit
def search_shard(native: Any, place: Any, turned: Any, floors: Any, work: Any, u: int, found: Any) -> None:
    """Candidates of shard ``u`` into ``found`` (Found of index/choosing.py), whose ``firsts`` and ``sizes`` stand.

    Args:
        native: see index/native.py. place: Place. turned: (g, d) queries in the space of the codes.
        floors: (g,) their thresholds. work: SearchScratch.
    """
    group, dim = turned.shape
    shifts, scaled, starts = found.floors[u], work.scaled, found.starts[u]
    for i in range(group):
        for j in range(dim):
            scaled[i, j] = turned[i, j] * place.deviation[j]
        shifts[i] = product(place.mean, turned[i])
        scaled[i, dim] = shifts[i] - floors[i]
    if place.codes != 0:
        scan_above(place.codes, found.sizes[u], scaled, MOST, work.scan, found.scores[u], found.ids[u], starts)
    else:
        search_above(native, place.faiss, scaled, MOST, found.scores[u], found.ids[u], starts)
    for i in range(group):
        floor, scores = floors[i], found.scores[u, starts[i] : starts[i + 1]]
        for c in range(len(scores)):
            scores[c] += floor
        found.floors[u, i] = scores.min() if len(scores) == MOST else floor


@jit
def shard_keys(number: int, keys: int) -> int:
    """Keys of one shard of an index over ``keys`` keys."""
    return min(SHARD_TOKENS, keys - number * SHARD_TOKENS)
