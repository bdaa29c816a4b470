# SPDX-License-Identifier: Apache-2.0
"""Choosing rows among the candidates of a search: sketch/sampling.py's rule in Numba, where most keys have one weight.

Of each shard (index/shard.py) the keys that score above a threshold for a query head have an estimated score; all
others are taken to weigh REST of what a key at the threshold does. So all keys that are no candidate of any head weigh
the same, and tiles of nothing else cost next to nothing.

What is done for a shard needs that shard alone, so that threads do it side by side; between these steps all shards are
added up: ``lift`` each, ``join``, ``weigh`` each, ``raised_tau``, ``draw`` each. Sums run in the order of the shards.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.index.rows import exp_in_place, jit
from vllm_retrieval_attn.sketch.sampling import BIN_SHIFT, BITS, ONE, TILE, Limits, Rows

REST = np.float32(0.3)
"""Weight of a key that is no candidate, as a share of a key's at the threshold: better than 0.1 and 0.6
(docs/index-study.md)."""
BINS = 0x41800000 >> BIN_SHIFT
"""Bins of weights up to 16; the last one takes all above. A weight is at most the query heads of a KV head."""
WORD = 64
"""Keys of a word of marks; shards begin with a word."""


class Found(NamedTuple):
    """What is found of one (row, KV head), shard after shard; a shard's is written by one thread.

    Attributes:
        scores, ids: (shards, room) float32 inner products by code less ``shifts``, and int32 numbers of keys within the
            shard; those of query head i of shard s at ``starts[s, i] .. starts[s, i + 1]``, in no order. Then, by
            :func:`weigh`, weights and keys of all candidates, ``counts[s]`` of them, ascending.
        starts: (shards, g + 1) int64. floors: (shards, g) float32, less than which all others score.
        shifts: (g,) float32, what is to be added to the scores.
        firsts, sizes: (shards,) int64 first key and keys.
        tops, sums, rests: (shards, g) of :func:`lift`: top score, sum of exponentials, that of a key that is no
            candidate; float32, float64, float32.
        shares: (shards, g) float32 of :func:`join`: what exponentials are to be multiplied by.
        counts, rest: (shards,) int64 and float32: candidates, and what every other key weighs.
        bins, masses: (shards, BINS) int64 and float64, histogram of the weights. below: (shards,) float64, what weighs
            too little for it.
    """

    scores: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    floors: npt.NDArray[np.float32]
    shifts: npt.NDArray[np.float32]
    firsts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    tops: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float64]
    rests: npt.NDArray[np.float32]
    shares: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    rest: npt.NDArray[np.float32]
    bins: npt.NDArray[np.int64]
    masses: npt.NDArray[np.float64]
    below: npt.NDArray[np.float64]


class ChoiceScratch(NamedTuple):
    """Memory of one thread.

    Attributes:
        extra: (keys,) float32, what a candidate weighs beyond the keys that are none; zeros between uses.
        marks: (keys / 64,) uint64, a bit for each candidate; zeros between uses.
        ids, log_pi: (keys,) int64 and float32, rows drawn.
    """

    extra: npt.NDArray[np.float32]
    marks: npt.NDArray[np.uint64]
    ids: npt.NDArray[np.int64]
    log_pi: npt.NDArray[np.float32]


def choice_scratch(keys: int) -> ChoiceScratch:
    """Memory for shards of up to ``keys`` keys."""
    return ChoiceScratch(
        np.zeros(keys, np.float32), np.zeros(-(-keys // WORD), np.uint64), np.zeros(keys, np.int64),
        np.zeros(keys, np.float32),
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
def lift(found: Any, s: int, scale: float) -> None:
    """Turn a shard's scores into exponentials, relative to the shard's top score. ``scale``: of the softmax."""
    for i in range(len(found.shifts)):
        shift, first, last = found.shifts[i], found.starts[s, i], found.starts[s, i + 1]
        scores = found.scores[s, first:last]
        top = found.floors[s, i]
        for c in range(last - first):
            top = max(top, scores[c])
        for c in range(last - first):
            scores[c] = (scores[c] - top) * scale
        exp_in_place(scores, last - first)
        total = np.float32(0.0)
        for c in range(last - first):
            total += scores[c]
        left = found.sizes[s] - (last - first)
        rest = np.exp((found.floors[s, i] - top) * scale) * REST if left > 0 else np.float32(0.0)
        found.tops[s, i], found.rests[s, i] = (top + shift) * scale, rest
        found.sums[s, i] = np.float64(total) + np.float64(rest) * left


@jit
def join(found: Any, shards: int, outside: Any) -> None:
    """What the exponentials of each shard are to be multiplied by to be shares of the whole attention.

    Args:
        outside: (g,) natural log-sum-exp over the keys that are read anyway.
    """
    for i in range(len(found.shifts)):
        top = outside[i]
        for s in range(shards):
            top = max(top, found.tops[s, i])
        total = np.float64(np.exp(outside[i] - top))
        for s in range(shards):
            total += found.sums[s, i] * np.exp(found.tops[s, i] - top)
        for s in range(shards):
            found.shares[s, i] = np.exp(found.tops[s, i] - top) / total


@jit
def _bin(weight: Any, word: Any) -> Any:
    """Number of a weight's bin; ``word``: (1,) float32 scratch. What is no number, as where a request's keys are none,
    must not leave the histogram of its shard either."""
    word[0] = weight
    return min(np.int64(word.view(np.uint32)[0] >> np.uint32(BIN_SHIFT)), BINS - 1)


@jit
def weigh(found: Any, s: int, tau: float, work: Any) -> None:
    """Turn a shard's exponentials into weights, and count those of tau's bin and above in a histogram."""
    size, floor = found.sizes[s], np.float32(0.0)
    for i in range(len(found.shifts)):
        share = found.shares[s, i]
        rest = found.rests[s, i] * share
        floor += rest
        for c in range(found.starts[s, i], found.starts[s, i + 1]):
            key = found.ids[s, c]
            work.extra[key] += found.scores[s, c] * share - rest
            work.marks[key // WORD] |= np.uint64(1) << np.uint64(key % WORD)
    word = np.empty(1, np.float32)
    last = _bin(np.float32(tau), word)
    bins, masses = found.bins[s], found.masses[s]
    for b in range(last, BINS):
        bins[b] = 0
        masses[b] = 0.0
    count, below = 0, 0.0
    for number in range((size + WORD - 1) // WORD):
        marks = work.marks[number]
        work.marks[number] = 0
        while marks != 0:
            key = number * WORD + _lowest_bit(marks)
            marks &= marks - np.uint64(1)
            weight = max(work.extra[key] + floor, np.float32(0.0))
            work.extra[key] = 0.0
            found.scores[s, count], found.ids[s, count] = weight, key
            count += 1
            b = _bin(weight, word)
            if b < last:
                below += weight
            else:
                bins[b] += 1
                masses[b] += weight
    b = _bin(floor, word)
    mass = np.float64(floor) * (size - count)
    if b < last:
        below += mass
    else:
        bins[b] += size - count
        masses[b] += mass
    found.counts[s], found.rest[s], found.below[s] = count, floor, below


@jit
def raised_tau(found: Any, shards: int, rows: int, tau: float) -> float:
    """As sketch/sampling.py's, over all keys of all shards."""
    word = np.empty(1, np.float32)
    last = _bin(np.float32(tau), word)
    below = 0.0
    for s in range(shards):
        below += found.below[s]
        for b in range(last, BINS):
            below += found.masses[s, b]
    above = 0
    upper = np.inf
    for b in range(BINS - 1, last - 1, -1):
        count, mass = 0, 0.0
        for s in range(shards):
            count += found.bins[s, b]
            mass += found.masses[s, b]
        if count == 0 and b > last:
            continue
        word.view(np.uint32)[0] = np.uint32(b) << np.uint32(BIN_SHIFT)
        lower = max(tau, np.float64(word[0]))
        if above + count + (below - mass) / lower > rows:
            return max(below / (rows - above), lower) if above < rows else upper
        above += count
        below -= mass
        upper = lower
    return tau


@jit
def _chance(weight: Any, tau: Any) -> Any:
    scaled = np.ceil(min(weight / tau, np.float32(1.0)) * np.float32(ONE))
    return max(np.int64(scaled), np.int64(1))


@jit
def _draw_alike(start: int, count: int, place: int, chance: int, log_chance: Any, n: int, work: Any) -> int:
    """Draw among ``count`` keys of one chance, from key ``start`` on; returns how many rows are drawn by then."""
    mark = (place >> BITS) + 1
    t = ((mark << BITS) - place + chance - 1) // chance - 1
    while t < count:
        work.ids[n], work.log_pi[n] = start + t, log_chance
        n += 1
        mark += 1
        t = ((mark << BITS) - place + chance - 1) // chance - 1
    return n


@jit
def _log(chance: int) -> Any:
    return np.float32(np.log(np.float64(chance)) - BITS * np.log(2.0))


@jit
def draw(found: Any, s: int, tau: float, seed: Any, work: Any) -> int:
    """Rows of one shard, into ``work.ids`` (numbers of keys over all shards, ascending) and ``work.log_pi``; returns
    how many.

    Tiles are numbered over all keys, so shards must hold whole tiles, but for the last.
    """
    n = 0
    low = np.float32(tau)
    first, size, count = found.firsts[s], found.sizes[s], found.counts[s]
    rest = _chance(found.rest[s], low)
    log_rest = _log(rest)
    c = 0
    for start in range(0, size, TILE):
        end = min(start + TILE, size)
        place = np.int64(mixed(seed, (first + start) // TILE) >> np.uint64(64 - BITS))
        at = start
        while c < count and found.ids[s, c] < end:
            key = found.ids[s, c]
            after = place + (key - at) * rest
            if after >> BITS != place >> BITS:
                n = _draw_alike(first + at, key - at, place, rest, log_rest, n, work)
            chance = _chance(found.scores[s, c], low)
            place, at = after + chance, key + 1
            if place >> BITS != after >> BITS:
                work.ids[n], work.log_pi[n] = first + key, _log(chance)
                n += 1
            c += 1
        if (place + (end - at) * rest) >> BITS != place >> BITS:
            n = _draw_alike(first + at, end - at, place, rest, log_rest, n, work)
    return n


def choose(
    found: Found, scale: float, outside: npt.NDArray[np.float32], limits: Limits, seed: Any, work: ChoiceScratch
) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Rows to read of one (row, KV head) and log pi of each; one shard after the other, as threads do side by side
    (workers/units.py)."""
    shards = range(len(found.sizes))
    for s in shards:
        lift(found, s, np.float32(scale))
    join(found, len(shards), np.asarray(outside, np.float32))
    for s in shards:
        weigh(found, s, limits.tau, work)
    tau = raised_tau(found, len(shards), limits.rows, limits.tau)
    counts = [(draw(found, s, tau, seed, work), work.ids.copy(), work.log_pi.copy()) for s in shards]
    return (
        np.concatenate([ids[:count] for count, ids, _ in counts]),
        np.concatenate([log_pi[:count] for count, _, log_pi in counts]),
    )
