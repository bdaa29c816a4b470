# SPDX-License-Identifier: Apache-2.0
"""Choosing rows from Faiss's candidates: sketch/sampling.py's rule in Numba, where most keys have one weight.

Of each shard (index/shard.py) the keys that score above a threshold for a query head have an estimated score; all
others are taken to weigh REST of what a key at the threshold does. So all keys that are no candidate of any head weigh
the same, and tiles of nothing else cost next to nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.index.rows import exp_in_place, jit
from vllm_retrieval_attn.sketch.sampling import BIN_SHIFT, BITS, ONE, TILE

REST = np.float32(0.3)
"""Weight of a key that is no candidate, as a share of a key's at the threshold: better than 0.1 and 0.6
(docs/index-study.md)."""
BINS = 1 << (32 - BIN_SHIFT)
WORD = 64
"""Keys of a word of marks; shards begin with a word."""


class Found(NamedTuple):
    """Candidates of one (row, KV head), shard after shard.

    Attributes:
        scores, ids: (shards, room) float32 inner products by code less ``shifts``, and int32 numbers of keys within the
            shard; those of query head i of shard s at ``starts[s, i] .. starts[s, i + 1]``, in no order.
        starts: (shards, g + 1) int64. floors: (shards, g) float32, less than which all others score.
        shifts: (g,) float32, what is to be added to the scores.
        firsts, sizes: (shards,) int64 first key and keys.
    """

    scores: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    floors: npt.NDArray[np.float32]
    shifts: npt.NDArray[np.float32]
    firsts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


class ChoiceScratch(NamedTuple):
    """Memory of one thread for as many keys as it will meet.

    Attributes:
        extra: (keys,) float32, what a candidate weighs beyond the keys that are none; zeros between uses.
        marks: (keys / 64,) uint64, a bit for each candidate; zeros between uses.
        counts, sums: (BINS,) int64 and float64. rest: (shards,) float32.
        ids, log_pi: (chosen,) int64 and float32, the result.
    """

    extra: npt.NDArray[np.float32]
    marks: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rest: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    log_pi: npt.NDArray[np.float32]


def choice_scratch(keys: int, shards: int, most: int) -> ChoiceScratch:
    """Memory for ``keys`` keys in ``shards`` shards, ``most`` rows chosen."""
    return ChoiceScratch(
        np.zeros(keys, np.float32), np.zeros(-(-keys // WORD) + 1, np.uint64), np.zeros(BINS, np.int64), np.zeros(BINS),
        np.zeros(shards, np.float32), np.zeros(most, np.int64),
        np.zeros(most, np.float32),
    )  # fmt: skip


@intrinsic
def _lowest_bit(typingctx: Any, word: Any) -> Any:
    """Number of the lowest bit set of an uint64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@jit
def mixed(state: Any, value: Any) -> Any:
    """As sketch/sampling.py's."""
    z = (state ^ np.uint64(value)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def seed_of(request_seed: int, position: int, layer: int, head: int) -> Any:
    """As sketch/sampling.py's."""
    return mixed(mixed(mixed(mixed(np.uint64(0), request_seed), position), layer), head)


@jit
def weigh(found: Any, shards: int, scale: float, outside: Any, work: Any) -> None:
    """Turn scores into weights: ``work.extra`` at the candidates, ``work.rest`` for the others of each shard.

    Args:
        found: Found; its scores are overwritten. scale: softmax scale.
        outside: (g,) natural log-sum-exp over the keys that are read anyway.
    """
    for s in range(shards):
        work.rest[s] = 0.0
    for i in range(len(found.shifts)):
        shift, top = found.shifts[i], outside[i]
        for s in range(shards):
            first, last = found.starts[s, i], found.starts[s, i + 1]
            best = found.floors[s, i]
            for c in range(first, last):
                best = max(best, found.scores[s, c])
            top = max(top, (best + shift) * scale)
        total = np.float64(np.exp(outside[i] - top))
        for s in range(shards):
            first, last = found.starts[s, i], found.starts[s, i + 1]
            scores = found.scores[s, first:last]
            for c in range(last - first):
                scores[c] = (scores[c] + shift) * scale - top
            exp_in_place(scores, last - first)
            part = np.float32(0.0)
            for c in range(last - first):
                part += scores[c]
            left = found.sizes[s] - (last - first)
            total += part + np.exp((found.floors[s, i] + shift) * scale - top) * REST * left
        share = np.float32(1.0 / total)
        for s in range(shards):
            first, last = found.starts[s, i], found.starts[s, i + 1]
            floor = np.float32(0.0)
            if found.sizes[s] > last - first:
                floor = np.exp((found.floors[s, i] + shift) * scale - top) * REST * share
            work.rest[s] += floor
            key = found.firsts[s]
            for c in range(first, last):
                place = key + found.ids[s, c]
                work.extra[place] += found.scores[s, c] * share - floor
                work.marks[place // WORD] |= np.uint64(1) << np.uint64(place % WORD)


@jit
def raised_tau(found: Any, shards: int, rows: int, tau: float, work: Any) -> float:
    """As sketch/sampling.py's, over all keys of all shards."""
    counts, sums = work.counts, work.sums
    for b in range(BINS):
        counts[b] = 0
        sums[b] = 0.0
    one = np.empty(1, np.float32)
    bits = one.view(np.uint32)
    below = 0.0
    for s in range(shards):
        first, size, floor = found.firsts[s], found.sizes[s], work.rest[s]
        candidates = 0
        for word in range(first // WORD, (first + size + WORD - 1) // WORD):
            marks = work.marks[word]
            while marks != 0:
                bit = _lowest_bit(marks)
                marks &= marks - np.uint64(1)
                one[0] = work.extra[word * WORD + bit] + floor
                b = bits[0] >> np.uint32(BIN_SHIFT)
                counts[b] += 1
                sums[b] += one[0]
                candidates += 1
        one[0] = floor
        b = bits[0] >> np.uint32(BIN_SHIFT)
        counts[b] += size - candidates
        sums[b] += np.float64(floor) * (size - candidates)
    for b in range(BINS):
        below += sums[b]
    one[0] = np.float32(tau)
    last = np.int64(bits[0] >> np.uint32(BIN_SHIFT))
    above = 0
    upper = np.inf
    for b in range(BINS - 1, last - 1, -1):
        if counts[b] == 0 and b > last:
            continue
        bits[0] = np.uint32(b) << np.uint32(BIN_SHIFT)
        lower = max(tau, np.float64(one[0]))
        if above + counts[b] + (below - sums[b]) / lower > rows:
            return max(below / (rows - above), lower) if above < rows else upper
        above += counts[b]
        below -= sums[b]
        upper = lower
    return tau


@jit
def _chance(weight: Any, tau: Any) -> Any:
    scaled = np.ceil(min(weight / tau, np.float32(1.0)) * np.float32(ONE))
    return max(np.int64(scaled), np.int64(1))


@jit
def _draw_alike(start: int, count: int, place: int, chance: int, log_chance: Any, n: int, work: Any) -> int:
    """Draw among ``count`` keys of one chance, from key ``start`` on; returns how many rows are chosen by then."""
    mark = (place >> BITS) + 1
    t = ((mark << BITS) - place + chance - 1) // chance - 1
    while t < count:
        if n == len(work.ids):
            return -1
        work.ids[n], work.log_pi[n] = start + t, log_chance
        n += 1
        mark += 1
        t = ((mark << BITS) - place + chance - 1) // chance - 1
    return n


@jit
def _log(chance: int) -> Any:
    return np.float32(np.log(np.float64(chance)) - BITS * np.log(2.0))


@jit
def draw(found: Any, shards: int, tau: float, seed: Any, work: Any) -> int:
    """Rows chosen, into ``work.ids`` and ``work.log_pi``; returns how many, -1 if those can not hold them. Clears
    ``work.extra`` and ``work.marks``.

    Tiles are numbered over all keys, so shards must hold whole tiles, but for the last.
    """
    n = 0
    low = np.float32(tau)
    for s in range(shards):
        first, size = found.firsts[s], found.sizes[s]
        rest = _chance(work.rest[s], low)
        log_rest = _log(rest)
        for start in range(first, first + size, TILE):
            end = min(start + TILE, first + size)
            place = np.int64(mixed(seed, start // TILE) >> np.uint64(64 - BITS))
            at = start
            for word in range(start // WORD, (end + WORD - 1) // WORD):
                marks = work.marks[word]
                work.marks[word] = 0
                while marks != 0:
                    key = word * WORD + _lowest_bit(marks)
                    marks &= marks - np.uint64(1)
                    after = place + (key - at) * rest
                    if after >> BITS != place >> BITS and n >= 0:
                        n = _draw_alike(at, key - at, place, rest, log_rest, n, work)
                    chance = _chance(work.extra[key] + work.rest[s], low)
                    work.extra[key] = 0.0
                    place, at = after + chance, key + 1
                    if place >> BITS != after >> BITS and n >= 0:
                        if n == len(work.ids):
                            n = -1
                        else:
                            work.ids[n], work.log_pi[n] = key, _log(chance)
                            n += 1
            if (place + (end - at) * rest) >> BITS != place >> BITS and n >= 0:
                n = _draw_alike(at, end - at, place, rest, log_rest, n, work)
    return n


@jit
def choose(found: Any, shards: int, scale: float, outside: Any, rows: int, tau: float, seed: Any, work: Any) -> int:
    """Rows to read of one (row, KV head): see :func:`weigh`, :func:`raised_tau`, :func:`draw`."""
    weigh(found, shards, scale, outside, work)
    return draw(found, shards, raised_tau(found, shards, rows, tau, work), seed, work)
