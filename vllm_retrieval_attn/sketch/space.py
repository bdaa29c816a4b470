# SPDX-License-Identifier: Apache-2.0
"""The space that codes live in: attention scores survive, and the noise of coding hurts them least.

For an invertible A, ``q . (k - mean) = (A^-T q) . (A (k - mean))``: keys may be coded in any space as long as queries
go along. The *balanced* space takes ``A = D R M^1/2`` with ``M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2``, the
geometric mean of the queries' second moment Sq and the inverse covariance Sk of the keys: among all transforms it
minimises the score error that noise of equal size in every dimension causes, summed over both sides. R is a fixed
random rotation, which makes dimensions alike; D makes the keys' standard deviation 1 in each.

Source: the weighting is that of anisotropic quantization (Guo et al., arXiv 1908.10396), balanced as measured in
docs/index-study.md.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RIDGE = 1e-3
"""Share of the mean variance added to every dimension, so that few queries do not make a direction free."""
_HEADS_AT_ONCE = 8
ROTATION, LEARNED = 0, 1
"""Which space coded a page: the constant rotation, or the model's own once it is learned."""


@dataclass(frozen=True)
class Space:
    """Transforms of some KV heads, whose number H comes first in every shape.

    Attributes:
        mean: (H, d) float32, subtracted from keys.
        keys: (H, d, d) float32, for column vectors: a key's coordinates are ``keys @ (k - mean)``.
        queries: (H, d, d) float32: its inverse transpose.
    """

    mean: Floats
    keys: Floats
    queries: Floats

    @property
    def heads(self) -> int:
        return len(self.mean)

    def one(self, head: int) -> "Space":
        """The space of one KV head, without the first axis."""
        return Space(self.mean[head], self.keys[head], self.queries[head])


@cache
def rotation(dim: int) -> Doubles:
    """A fixed random orthogonal matrix, (dim, dim) float64; the same on every machine."""
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal((dim, dim))
    return np.linalg.qr(noise)[0]


def rotated(heads: int, dim: int) -> Space:
    """The constant space that needs no statistics: a rotation."""
    turn = np.repeat(rotation(dim).astype(np.float32)[None], heads, 0)
    return Space(np.zeros((heads, dim), np.float32), turn, turn)


def balanced(mean: npt.NDArray[Any], covariance: npt.NDArray[Any], moment: npt.NDArray[Any]) -> Space:
    """The balanced space.

    Args:
        mean, covariance: (H, d) and (H, d, d) of the keys. moment: (H, d, d) second moment E[q q^T] of the queries of
            all query heads that share the KV head.

    Raises:
        ValueError: statistics that are not finite.
    """
    spread, wanted = (np.asarray(part, np.float64) for part in (covariance, moment))
    heads = [slice(first, first + _HEADS_AT_ONCE) for first in range(0, len(spread), _HEADS_AT_ONCE)]
    # The next prompt waits for this. BLAS with threads of its own is slower than without, for matrices so small.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(len(heads), len(os.sched_getaffinity(0)))) as pool:
        parts = list(pool.map(lambda some: _balanced(mean[some], spread[some], wanted[some]), heads))
    return Space(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Space)))


def _balanced(mean: npt.NDArray[Any], spread: Doubles, wanted: Doubles) -> Space:
    if not (np.isfinite(spread).all() and np.isfinite(wanted).all() and np.isfinite(mean).all()):
        raise ValueError("statistics of keys and queries must be finite")
    root = np.linalg.cholesky(_ridged(spread))
    values, vectors = np.linalg.eigh(root.swapaxes(-1, -2) @ _ridged(wanted) @ root)
    # With Sk = L L^T and L^T Sq L = U w U^T, M is L^-T U w^1/2 U^T L^-1: M^1/2 is w^1/4 U^T L^-1 but for a rotation.
    values = np.maximum(values, values.max(-1, keepdims=True) * 1e-7)
    turned = rotation(spread.shape[-1])
    queries = (turned * values[..., None, :] ** -0.25) @ vectors.swapaxes(-1, -2) @ root.swapaxes(-1, -2)
    keys = np.linalg.inv(queries).swapaxes(-1, -2)
    deviation = np.sqrt(((keys @ _ridged(spread)) * keys).sum(-1))[..., None]
    return Space(
        np.asarray(mean, np.float32), (keys / deviation).astype(np.float32), (queries * deviation).astype(np.float32)
    )


def balanced_for(keys: npt.NDArray[Any], queries: npt.NDArray[Any]) -> Space:
    """The balanced space of one head's keys (n, d) and queries (m, d), as one of H = 1 heads."""
    rows, asked = np.asarray(keys, np.float64), np.asarray(queries, np.float64)
    centred = rows - rows.mean(0)
    return balanced(rows.mean(0)[None], (centred.T @ centred / len(rows))[None], (asked.T @ asked / len(asked))[None])


def _ridged(matrix: Doubles) -> Doubles:
    mean = np.maximum(np.trace(matrix, axis1=-2, axis2=-1) / matrix.shape[-1], 1e-12)
    ridged: Doubles = matrix + RIDGE * mean[..., None, None] * np.eye(matrix.shape[-1])
    return ridged
