# SPDX-License-Identifier: Apache-2.0
"""Codes in the layout that Faiss's FastScan scans (faiss/impl/pq4_fast_scan.cpp, ``pq4_pack_codes``).

A block holds 32 keys. For each pair of dimensions it has 32 bytes: 16 for the first, 16 for the second; byte j carries
the codes of keys ``ORDER[j]`` (low nibble) and ``ORDER[j] + 16`` (high nibble). After the keys' d dimensions (d is
even) one more follows, alike for all keys (index/shard.py), and one that makes the number even; both have code 0.
"""

from typing import Any

import numba
import numpy as np

from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import jit

BLOCK = 32
"""Keys of a block."""
ORDER = (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
STEP = 0.48
"""Distance of two levels in standard deviations of the keys before (index/head.py). Wider than is best for normally
distributed keys: what drifts must not be cut off."""
SAMPLE = 128
"""One key of so many, the middle one, is kept as it is: thresholds are taken from those (index/search.py)."""
_INVERSE = np.float32(1.0 / STEP)


@jit
def packed_bytes(n: int, dim: int) -> int:
    """Bytes of ``n`` keys of ``dim`` dimensions, whole blocks."""
    return n * (dim + 2) // 2


def bytes_per_key(dim: int) -> float:
    """Bytes of a key of ``dim`` dimensions in an index: code, Faiss's number of it, and its part of a sample."""
    return (dim + 2) / 2 + 8 + 4 * dim / SAMPLE


@jit
def pack(places: Any, mean: Any, deviation: Any, out: Any) -> None:
    """Code coordinates (n, d) float32, n a multiple of BLOCK, less ``mean`` (d,), divided by ``deviation`` (d,), into
    ``out``, packed_bytes(n, d) uint8."""
    n, dim = places.shape
    levels = np.empty((BLOCK, dim), np.uint8)
    for block in range(n // BLOCK):
        for t in range(BLOCK):
            row = places[block * BLOCK + t]
            line = levels[t]
            for j in range(dim):
                x = np.rint((row[j] - mean[j]) / deviation[j] * _INVERSE + np.float32(7.5))
                line[j] = np.uint8(min(max(x, np.float32(0.0)), np.float32(15.0)))
        base = block * 16 * (dim + 2)
        for b in range(16):
            low, high = levels[ORDER[b]], levels[ORDER[b] + 16]
            for j in range(dim):
                out[base + (j // 2) * 32 + (j % 2) * 16 + b] = low[j] | (high[j] << np.uint8(4))
        out[base + 16 * dim : base + 16 * (dim + 2)] = 0


@jit
def append(places: Any, mean: Any, deviation: Any, before: int, codes: int, ids: int, samples: Any) -> None:
    """Code keys, as :func:`pack` does, behind ``before`` others of a shard; number them, and keep samples of them.

    Args:
        codes, ids: addresses of all of the shard's codes, and of their int64 numbers. samples: see Shard.
    """
    n, dim = places.shape
    size = packed_bytes(n, dim)
    pack(places, mean, deviation, numba.carray(pointer_to(codes + packed_bytes(before, dim)), (size,), np.uint8))
    numbers = numba.carray(pointer_to(ids), (before + n,), np.int64)
    for key in range(before, before + n):
        numbers[key] = key
        if key % SAMPLE == SAMPLE // 2:
            for j in range(dim):
                samples[j, key // SAMPLE] = places[key - before, j]
