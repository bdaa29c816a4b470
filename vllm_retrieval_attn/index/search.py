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
from vllm_retrieval_attn.index.rows import jit
from vllm_retrieval_attn.index.scan import ScanScratch, scan_above, scan_scratch
from vllm_retrieval_attn.index.shard import SAMPLES, SHARD_TOKENS

MOST = 2048
"""Candidates of a query head that one shard gives at most: the best."""


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
        best: (candidates / 64 + 2,) float32. scaled: (g, d + 1) float32, queries in a shard's scale. scan: of
            index/scan.py.
    """

    best: npt.NDArray[np.float32]
    scaled: npt.NDArray[np.float32]
    scan: ScanScratch


def search_scratch(group: int, dim: int, candidates: int) -> SearchScratch:
    """Memory for ``group`` query heads that ask for about ``candidates`` keys each."""
    best, scaled = np.zeros(candidates // 64 + 2, np.float32), np.zeros((group, dim + 1), np.float32)
    return SearchScratch(best, scaled, scan_scratch(dim, SHARD_TOKENS))


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
def threshold(samples: Any, keys: int, candidates: int, turned: Any, best: Any) -> Any:
    """The score of a turned query that about ``candidates`` of ``keys`` keys reach, at most half of them.

    Args:
        samples: (shards,) int64 addresses of the shards' samples. best: (candidates / 64 + 2,) float32 scratch.
    """
    count = (keys + SAMPLE // 2 - 1) // SAMPLE
    wanted = max(1, min(candidates, keys // 2) * count // keys)
    held = 0
    for s in range(count):
        at = s % SAMPLES
        if at == 0:
            part = numba.carray(pointer_to(samples[s // SAMPLES]), (SAMPLES, len(turned)), np.float32)
        score = product(part[at], turned)
        if held == wanted and not score > best[wanted - 1]:
            continue
        place = held if held < wanted else wanted - 1
        while place > 0 and best[place - 1] < score:
            best[place] = best[place - 1]
            place -= 1
        best[place] = score
        held = min(held + 1, wanted)
    return best[wanted - 1]


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
