# SPDX-License-Identifier: Apache-2.0
"""Candidates of one query among the keys of a KV head: all that score above a threshold, from Faiss.

The threshold of a query head is the score that about ``candidates`` keys reach, estimated from every SAMPLE-th key
(index/shard.py). It depends on keys and query alone.
"""

from typing import Any

import numba
import numpy as np

from vllm_retrieval_attn.index.native import pointer_to, search_above
from vllm_retrieval_attn.index.packing import SAMPLE
from vllm_retrieval_attn.index.rows import jit
from vllm_retrieval_attn.index.shard import SAMPLES, SHARD_TOKENS

MOST = 2048
"""Candidates of a query head that one shard gives at most: the best."""


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
def search_shard(
    native: Any, index: int, mean: Any, deviation: Any, turned: Any, floors: Any, scaled: Any, u: int, found: Any
) -> None:
    """Candidates of shard ``u`` into ``found`` (Found of index/choosing.py), whose ``firsts`` and ``sizes`` stand.

    Args:
        native: see index/native.py. index: address of the shard's. mean, deviation: (d,) of the shard.
        turned: (g, d) queries in the space of the codes. floors: (g,) their thresholds. scaled: (g, d + 1) scratch.
    """
    group, dim = turned.shape
    shifts = found.floors[u]
    for i in range(group):
        for j in range(dim):
            scaled[i, j] = turned[i, j] * deviation[j]
        shifts[i] = product(mean, turned[i])
        scaled[i, dim] = shifts[i] - floors[i]
    starts = found.starts[u]
    search_above(native, index, scaled, MOST, found.scores[u], found.ids[u], starts)
    for i in range(group):
        floor = floors[i]
        least = np.float32(np.inf)
        for c in range(starts[i], starts[i + 1]):
            found.scores[u, c] += floor
            least = min(least, found.scores[u, c])
        full = starts[i + 1] - starts[i] == MOST
        found.floors[u, i] = least if full else floor


@jit
def shard_keys(number: int, keys: int) -> int:
    """Keys of one shard of an index over ``keys`` keys."""
    return min(SHARD_TOKENS, keys - number * SHARD_TOKENS)
