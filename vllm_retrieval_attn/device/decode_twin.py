# SPDX-License-Identifier: Apache-2.0
"""What the kernels of decode.cu compute, in plain NumPy, for one row and KV head at a time.

Scores, weights, tau and chances are made of separately rounded float32 operations and integer sums in both, so that the
same codes and queries give the same rows. Shapes: G query heads of a KV head, d the head size, P the coordinates of a
code (decode_step.Geometry).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.device.decode_step import PAGE, TILES
from vllm_retrieval_attn.sketch import codes, sampling
from vllm_retrieval_attn.sketch.sampling import BIN_SHIFT, TILE
from vllm_retrieval_attn.sketch.space import Floats, Space

DIGIT = 254
FIRST_BIN, BINS = (127 - 40) * 4, 256
"""Bins reach from 2^-40 to 2^24."""
COUNT_SHIFT = 43
MASS_BITS = 59
LOG2E = np.float32(1.44269504)
MAGIC = np.float32(12582912.0)
POLYNOMIAL = (0.009582852944731712, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163, 1.0)
Halves = npt.NDArray[np.float16]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Queries as integers of two digits.

    Attributes:
        digits: (fragments, 8, P) int8: of each query head its first and second digit by turns.
        unit: (G,) float32, half the value of one. bias: (G,) float32, added to scores. centre: (G,) int64, 15 times the
            sum of the integers.
    """

    digits: npt.NDArray[np.int8]
    unit: Floats
    bias: Floats
    centre: Integers


@dataclass(frozen=True)
class Scored:
    """Scores of some pages.

    Attributes:
        scores: (pages, tiles, G, 128) float16 relative to tops: (pages, tiles, G) float32.
        records: (pages, G, 2) float32, top of a page and its sum of exponentials.
    """

    scores: Halves
    tops: Floats
    records: Floats


def exp_fixed(x: Any) -> Floats:
    """exp(x) for x <= 0 to 3e-6; below 2^-125 it stays there."""
    v = np.maximum(np.asarray(x, np.float32) * LOG2E, np.float32(-125))
    shifted = v + MAGIC
    f = v - (shifted - MAGIC)
    p = np.full_like(f, POLYNOMIAL[0])
    for factor in POLYNOMIAL[1:]:
        p = p * f + np.float32(factor)
    raised: Floats = (p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
    return raised


def padded_to(places: Floats, padded: int) -> Floats:
    """(n, d) as (n, padded), with zeros."""
    return np.pad(places, ((0, 0), (0, padded - places.shape[1])))


def query_digits(queries: npt.NDArray[Any], space: Space, scale: float, padded: int) -> Asked:
    """Queries (G, d) of one KV head as the score kernel wants them."""
    asked = np.asarray(queries, np.float32)
    turned = padded_to(((asked @ space.queries.T) * np.float32(scale)).astype(np.float32), padded)
    group = len(turned)
    unit = np.maximum(np.abs(turned).max(1), np.float32(1e-30)) / np.float32(127 * DIGIT)
    whole = np.rint(turned / unit[:, None]).astype(np.int64)
    high = np.rint(whole.astype(np.float32) / np.float32(DIGIT)).astype(np.int64)
    digits = np.zeros((-(-group // 4) * 4, 2, padded), np.int8)
    digits[:group, 0], digits[:group, 1] = high, whole - high * DIGIT
    bias = ((asked @ space.mean) * np.float32(scale)).astype(np.float32)
    return Asked(digits.reshape(-1, 8, padded), np.float32(0.5) * unit, bias, 15 * whole.sum(1))


def encode_places(places: Floats, padded: int) -> tuple[codes.Codes, Halves]:
    """Codes (n, P / 2) uint8 and steps (n,) float16 of coordinates (n, d), as sketch/codes.py; padding is coded."""
    wanted = np.float32(codes.STEP) * np.sqrt(np.square(places).mean(1))
    steps = np.maximum(wanted, 6e-8).astype(np.float16)
    levels = codes.levels(padded_to(places, padded), steps.astype(np.float32)[:, None])
    half = padded // 2
    packed: codes.Codes = levels[:, :half] | levels[:, half:] << np.uint8(4)
    return packed, steps


def blocks_of(sketch: codes.Codes, key_bytes: int) -> tuple[codes.Codes, Halves]:
    """Codes (n, 1024, P / 2) and steps (n, 1024) of sketch blocks (n, bytes)."""
    split = PAGE * key_bytes
    return sketch[:, :split].reshape(-1, PAGE, key_bytes), np.ascontiguousarray(sketch[:, split:]).view(np.float16)


def score_pages(asked: Asked, packed: codes.Codes, steps: Halves, tokens: int) -> Scored:
    """Scores of the first ``tokens`` keys of pages with codes (pages, 1024, P / 2) and steps (pages, 1024).

    Keys that do not exist score -inf; where a tile has none, so does its top.
    """
    group, pages = len(asked.unit), len(packed)
    levels = np.concatenate((packed & 15, packed >> 4), axis=-1)
    pairs = asked.digits.reshape(-1, 2, levels.shape[-1])[:group].astype(np.int64)
    whole = (DIGIT * pairs[:, 0] + pairs[:, 1]).astype(np.float64)
    products = np.rint(np.einsum("pkc,gc->pgk", levels.astype(np.float64), whole)).astype(np.int64)
    centred = (2 * products - asked.centre[None, :, None]).astype(np.int32).astype(np.float32)
    found = centred * asked.unit[None, :, None] * steps.astype(np.float32)[:, None, :] + asked.bias[None, :, None]
    there = np.arange(pages * PAGE).reshape(pages, 1, PAGE) < tokens
    tiles = np.where(there, found, -np.inf).astype(np.float32).reshape(pages, group, TILES, TILE).swapaxes(1, 2)
    tops = tiles.max(-1)
    safe = np.where(np.isfinite(tops), tops, 0).astype(np.float32)
    with np.errstate(over="ignore"):
        scores = (tiles - safe[..., None]).astype(np.float16)
    raised = np.rint(exp_fixed(scores.astype(np.float32)) * np.float32(1 << 24)).astype(np.uint32)
    sums = raised.sum(-1, dtype=np.uint32)
    page_tops = tops.max(1)
    base = np.where(np.isfinite(page_tops), page_tops, 0).astype(np.float32)
    totals = np.zeros((pages, group), np.float32)
    for tile in range(TILES):
        part = sums[:, tile].astype(np.float32) * np.float32(2.0**-24)
        totals = totals + part * exp_fixed(tops[:, tile] - base)
    return Scored(scores, tops, np.stack((page_tops, totals), -1))


def no_keys(lse: Any) -> Floats:
    """Log-sum-exp of a part where FlashAttention's +inf for no keys is -inf."""
    return np.where(np.isposinf(lse), -np.inf, lse).astype(np.float32)


def whole_attention(records: Floats, outside: Floats) -> Floats:
    """(G, 2): top score of the whole attention and 1 / sum of exponentials, from records (pages, G, 2) and the natural
    log-sum-exp (G,) of the paged part."""
    outside = no_keys(outside)
    top = np.maximum(records[..., 0].max(0, initial=-np.inf), outside)
    top = np.where(np.isfinite(top), top, 0).astype(np.float32)
    unit = np.float32(1 << 30)
    parts = np.rint(records[..., 1] * exp_fixed(records[..., 0] - top) * unit).astype(np.uint64)
    sums = parts.sum(0) + np.rint(exp_fixed(outside - top) * unit).astype(np.uint64)
    total = (sums.astype(np.float64) * 2.0**-30).astype(np.float32)
    inverse = np.where(sums > 0, np.float32(1) / np.maximum(total, np.float32(1e-30)), np.float32(0))
    return np.stack((top, inverse.astype(np.float32)), -1)


def weights_of(scored: Scored, shares: Floats) -> Floats:
    """(pages * 1024,) float32 shares in the whole attention, summed over query heads in order."""
    pages, _, group, _ = scored.scores.shape
    weights = np.zeros((pages, TILES, TILE), np.float32)
    for g in range(group):
        shift = scored.tops[:, :, g] - shares[g, 0]
        weights = weights + exp_fixed(scored.scores[:, :, g].astype(np.float32) + shift[..., None]) * shares[g, 1]
    return weights.reshape(-1)


def clamped(tau: float) -> float:
    """tau within what bins cover."""
    return min(max(tau, 2.0**-40), 8.0)


def _last_bin(tau: float) -> int:
    return (int(np.float32(clamped(tau)).view(np.uint32)) >> BIN_SHIFT) - FIRST_BIN


def histogram(weights: Floats, tau: float) -> Integers:
    """(257,) int64. Bins: count << 43 | sum of the low 21 bits of the weights; last, the weights below tau's bin,
    in units of 2^-20 times that bin's power of two."""
    last = _last_bin(tau)
    bits = weights.view(np.uint32)
    bins = (bits >> BIN_SHIFT).astype(np.int64) - FIRST_BIN
    in_bins = bins >= last
    found = np.zeros(BINS + 1, np.int64)
    low = (bits & np.uint32((1 << BIN_SHIFT) - 1)).astype(np.int64)
    np.add.at(found, bins[in_bins], (1 << COUNT_SHIFT) + low[in_bins])
    factor = np.float32(2.0 ** (147 - (last + FIRST_BIN) // 4))
    found[BINS] = int(np.rint(weights[~in_bins] * factor).astype(np.int64).sum())
    return found


def raised_tau(bins: Integers, limit: int, tau: float) -> np.float32:
    """sampling.raised_tau from a histogram, whose masses are whole multiples of 2^-59."""
    last, tau = _last_bin(tau), clamped(tau)
    counts = [int(x) >> COUNT_SHIFT for x in bins[:BINS]]
    masses = []
    for number, packed in enumerate(bins[:BINS]):
        low = int(packed) & (1 << COUNT_SHIFT) - 1
        whole = counts[number] * ((1 << 23) + ((number & 3) << BIN_SHIFT)) + low
        masses.append(_shifted(whole, (number + FIRST_BIN) // 4 - 91))
    above, below = 0, sum(masses) + _shifted(int(bins[BINS]), (last + FIRST_BIN) // 4 - 88)
    highest = max((number for number, count in enumerate(counts) if count), default=last)
    for number in range(max(highest, last), last - 1, -1):
        lower, upper = max(tau, _edge(number)), _edge(number + 1)
        if above + counts[number] + (below - masses[number]) * 2.0**-MASS_BITS / lower > limit:
            raised = max(below * 2.0**-MASS_BITS / (limit - above), lower) if above < limit else upper
            return np.float32(raised)
        above, below = above + counts[number], below - masses[number]
    return np.float32(tau)


def _shifted(value: int, by: int) -> int:
    return value << by if by >= 0 else value >> -by


def _edge(number: int) -> float:
    return float(np.uint32((number + FIRST_BIN) << BIN_SHIFT).view(np.float32))


def choose(weights: Floats, tokens: int, tau: np.float32, seed: int) -> tuple[sampling.Rows, Floats]:
    """Numbers of the keys read of the first ``tokens``, ascending, and log pi of each."""
    chances = sampling.probabilities(weights[:tokens], float(tau))
    rows = sampling.draw(chances, seed)
    return rows, log_pi_of(chances[rows])


def log_pi_of(chances: npt.NDArray[np.uint32]) -> Floats:
    """Natural logarithm of chances in units of 2^-24."""
    return np.log(chances.astype(np.float64) / sampling.ONE).astype(np.float32)


def choose_all(tokens: int) -> tuple[sampling.Rows, Floats]:
    """As :func:`choose` where a row has no more keys than its limit."""
    return np.arange(tokens), np.zeros(tokens, np.float32)


def merge(out: Floats, outside: Floats, more: Floats, lse: Floats) -> Floats:
    """Outputs (G, d) over the paged keys and over those read, merged by their log-sum-exps (G,)."""
    outside = no_keys(outside)
    top = np.maximum(outside, lse)
    top = np.where(np.isfinite(top), top, 0)
    a, b = np.exp(outside - top)[:, None], np.exp(lse - top)[:, None]
    merged: Floats = (np.where(a > 0, out, 0) * a + more * b) / np.maximum(a + b, 1e-30)
    return merged
