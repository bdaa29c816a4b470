# SPDX-License-Identifier: Apache-2.0
"""Keys turned into the space of their codes, and mean and deviation of the last of them.

Each in one call without Python's lock: with many threads that index, to take it back after every step of NumPy took
several times as long as the steps (docs/benchmarks.md, 2026-11-27, evening).
"""

from typing import Any

import numpy as np

from vllm_retrieval_attn.index.packing import BLOCK
from vllm_retrieval_attn.index.rows import FLOAT32, jit
from vllm_retrieval_attn.index.vector import add_values
from vllm_retrieval_attn.sketch.space import Doubles, Floats

REFERENCE = 1024
"""Keys whose mean and deviation the next shard takes; the first append must bring as many. Divides a shard."""


@jit
def coordinates(keys: Any, mean: Any, matrix: Any, out: Any) -> None:
    """Turn keys (n, d) float32, n a multiple of BLOCK, into ``out`` (n, d), cleared: ``(keys - mean) @ matrix``."""
    n, dim = keys.shape
    centred, starts = np.empty((BLOCK, dim), np.float32), np.arange(dim) * dim
    base = matrix.ctypes.data - 4 * dim  # where the keys of rows would lie, whose values are the matrix
    for first in range(0, n, BLOCK):
        for t in range(BLOCK):
            for j in range(dim):
                centred[t, j] = keys[first + t, j] - mean[j]
        target = out[first : first + BLOCK].ctypes.data
        add_values(base, FLOAT32, starts.ctypes.data, dim, dim, centred.ctypes.data, dim, BLOCK, target)


@jit
def _add_moments(places: Any, sums: Any, count: int, mean: Any, deviation: Any) -> int:
    """Take coordinates (n, d) in; see Moments. ``count``: keys in ``sums``, returned as they are then."""
    n, dim = places.shape
    block = np.empty((2, dim), np.float32)
    for first in range(0, n, BLOCK):
        block[:] = 0.0
        for t in range(BLOCK):
            for j in range(dim):
                x = places[first + t, j]
                block[0, j] += x
                block[1, j] += x * x
        for j in range(dim):
            sums[0, j] += block[0, j]
            sums[1, j] += block[1, j]
        count += BLOCK
        if count == REFERENCE:
            largest = 0.0
            for j in range(dim):
                average = sums[0, j] / REFERENCE
                sums[1, j] = np.sqrt(max(sums[1, j] / REFERENCE - average * average, 0.0))
                mean[j] = average
                largest = max(largest, sums[1, j])
            for j in range(dim):
                deviation[j] = max(sums[1, j], 1e-4 * largest, 1e-20)
            sums[:] = 0.0
            count = 0
    return count


class Moments:
    """Mean and deviation, (d,) float32, of coordinates over the last whole REFERENCE keys."""

    def __init__(self, dim: int) -> None:
        self._sums: Doubles = np.zeros((2, dim))
        self._count = 0
        self.mean: Floats = np.zeros(dim, np.float32)
        self.deviation: Floats = np.ones(dim, np.float32)

    def add(self, places: Floats) -> None:
        """Take in coordinates (n, d) float32, n a multiple of BLOCK; pieces make no difference."""
        self._count = _add_moments(places, self._sums, self._count, self.mean, self.deviation)
