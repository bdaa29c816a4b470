# SPDX-License-Identifier: Apache-2.0
"""Which keys a decode step reads: each with probability proportional to its estimated weight.

A key of estimated weight w (its share of the whole attention, summed over the query heads that share the KV head) is
read with probability ``min(1, w / tau)`` and then counts 1 / that: its score gets ``-log pi``. The sum is unbiased
whatever the estimates are (Horvitz and Thompson, 1952); good estimates make its variance small.

Drawing is systematic within tiles of TILE keys: probabilities are whole multiples of 2^-BITS, laid end to end from an
offset hashed from (seed, tile), and a key is taken where the running sum passes a whole number. So ids are a pure
function of weights and seed, tiles do not depend on each other, and no floating-point sum decides.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.sketch.space import Floats

TILE = 128
BITS = 24
ONE = 1 << BITS
"""The probability 1. A tile's sum stays below 2^32."""
BIN_SHIFT = 21
"""Weights are binned by the upper bits of their float32 form: four bins from one power of two to the next."""
_MASK = (1 << 64) - 1

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """Attributes:
    rows: keys read on average, at most. tau: weight from which on a key is always read.
    """

    rows: int
    tau: float


def mixed(state: int, value: int) -> int:
    """A 64-bit state with one more number hashed into it (splitmix64, Steele et al. 2014)."""
    z = ((state ^ value) + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_of(request_seed: int, position: int, layer: int, head: int) -> int:
    """The seed of one draw; ``head`` is the KV head's number in the whole model."""
    state = mixed(0, request_seed & _MASK)
    for value in (position, layer, head):
        state = mixed(state, value)
    return state


def weights_of(scores: Floats, outside: Floats) -> Floats:
    """Estimated share of every key in the whole attention, summed over query heads.

    Args:
        scores: (g, n) scaled scores. outside: (g,) natural log-sum-exp over the keys that are read anyway.

    Returns:
        (n,) float32.
    """
    top = np.maximum(scores.max(1, initial=-np.inf), outside)
    top = np.where(np.isfinite(top), top, 0).astype(np.float32)
    raised = np.exp(scores - top[:, None])
    total = raised.sum(1) + np.exp(outside - top)
    found: Floats = (raised / np.maximum(total, np.float32(1e-30))[:, None]).sum(0).astype(np.float32)
    return found


def raised_tau(weights: Floats, limits: Limits) -> float:
    """The smallest tau, at least ``limits.tau``, for which the rows read on average stay within ``limits.rows``.

    Weights are taken together by bins; within the bin where the limit falls all are treated as if below tau, so that
    the rows never exceed the limit and fall short of it by little.
    """
    bins = weights.astype(np.float32).view(np.uint32) >> BIN_SHIFT
    first = int(np.float32(limits.tau).view(np.uint32)) >> BIN_SHIFT
    counts = np.bincount(bins, minlength=first + 1)
    sums = np.bincount(bins, weights.astype(np.float64), minlength=first + 1)
    above, below = 0, float(sums.sum())
    upper = float(np.uint32(len(counts) << BIN_SHIFT).view(np.float32))
    for number in range(len(counts) - 1, first - 1, -1):
        lower = max(limits.tau, float(np.uint32(number << BIN_SHIFT).view(np.float32)))
        count, mass = int(counts[number]), float(sums[number])
        # What lies below tau = limits.tau within its own bin is below `lower` only by name: at most a bin's width.
        if above + count + (below - mass) / lower > limits.rows:
            return max(below / (limits.rows - above), lower) if above < limits.rows else upper
        above, below, upper = above + count, below - mass, lower
    return limits.tau


def probabilities(weights: Floats, tau: float) -> npt.NDArray[np.uint32]:
    """(n,) inclusion probabilities in units of 2^-BITS, from 1 to ONE."""
    scaled = np.ceil(np.minimum(weights / np.float32(tau), np.float32(1)) * np.float32(ONE))
    return np.maximum(scaled, 1).astype(np.uint32)


def draw(chances: npt.NDArray[np.uint32], seed: int) -> Rows:
    """Row numbers taken, ascending, given probabilities (n,) in units of 2^-BITS."""
    taken = []
    for tile, first in enumerate(range(0, len(chances), TILE)):
        offset = mixed(seed, tile) >> (64 - BITS)
        ends = offset + np.cumsum(chances[first : first + TILE].astype(np.int64))
        starts = np.concatenate(([offset], ends[:-1]))
        taken.append(first + np.flatnonzero(ends >> BITS != starts >> BITS))
    return np.concatenate(taken) if taken else np.empty(0, np.int64)


def choose(weights: Floats, limits: Limits, seed: int) -> tuple[Rows, Floats]:
    """Keys to read: their numbers, ascending, and log pi of each, (r,) float32."""
    chances = probabilities(weights, raised_tau(weights, limits))
    rows = draw(chances, seed)
    return rows, (np.log(chances[rows].astype(np.float64)) - BITS * np.log(2)).astype(np.float32)


def attend(
    keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats, scale: float, rows: Rows, log_pi: Floats
) -> tuple[Floats, Floats]:
    """Attention of (g, d) queries over chosen rows, each weighted 1 / pi: (g, d) and (g,) natural log-sum-exp."""
    scores = (queries @ np.asarray(keys[rows], np.float32).T) * np.float32(scale) - log_pi
    top = scores.max(1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0)
    raised = np.exp(scores - safe[:, None])
    total = raised.sum(1)
    out = raised @ np.asarray(values[rows], np.float32) / np.maximum(total, np.float32(1e-30))[:, None]
    with np.errstate(divide="ignore"):
        return out.astype(np.float32), (safe + np.log(total)).astype(np.float32)
