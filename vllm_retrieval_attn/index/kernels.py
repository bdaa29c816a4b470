"""Numba kernels over rows of keys and values in host memory.

Rows are read where they lie (float32, bfloat16 or float16 in a byte buffer), converted a tile
at a time into float32 scratch, and accumulated in float32 with the online softmax of
FlashAttention (arXiv 2205.14135, algorithm 1). All kernels release the GIL.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Codes for the element type of stored rows."""
DTYPE_CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
TILE = 64
"""Keys converted and scored at a time: a tile of 64 x 128 float32 stays in L1."""

_LOG2E = np.float32(1.4426950408889634)
_LN2_HI = np.float32(0.693359375)
_LN2_LO = np.float32(-2.12194440e-4)
_TWO_112 = np.float32(5.192296858534828e33)

jit = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})


@jit
def load_rows(mem16: Any, mem32: Any, dtype: int, start: int, n: int, dim: int, out: Any, out_bits: Any) -> None:
    """Convert ``n`` rows of ``dim`` elements, the first at element ``start``, into ``out`` (float32).

    ``out_bits`` is the uint32 view of ``out``; ``mem16`` and ``mem32`` are the uint16 and float32
    views of one buffer.
    """
    # Slices first: an index whose sign the compiler does not know keeps the loops from vectorising.
    if dtype == FLOAT32:
        words = mem32[start : start + n * dim]
        for t in range(n):
            word = words[t * dim : (t + 1) * dim]
            row = out[t]
            for j in range(dim):
                row[j] = word[j]
        return
    halves = mem16[start : start + n * dim]
    for t in range(n):
        half = halves[t * dim : (t + 1) * dim]
        bits = out_bits[t]
        if dtype == BFLOAT16:  # the upper half of a float32
            for j in range(dim):
                bits[j] = np.uint32(half[j]) << np.uint32(16)
        else:  # float16: shift the fields into place, then correct the exponent bias
            row = out[t]
            for j in range(dim):
                h = np.uint32(half[j])
                bits[j] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13))
            for j in range(dim):
                row[j] *= _TWO_112


@jit
def exp_in_place(x: Any, n: int, bits: Any, scale: Any) -> None:
    """``x[:n] = exp(x[:n])`` for x <= 0, without a libm call so that it vectorises.

    ``bits``/``scale`` are an int32 scratch row and its float32 view. Relative error below 3e-7.
    """
    for t in range(n):
        v = max(x[t], np.float32(-87.0))
        k = np.floor(v * _LOG2E + np.float32(0.5))
        r = v - k * _LN2_HI - k * _LN2_LO
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        bits[t] = (np.int32(k) + np.int32(127)) << np.int32(23)
        x[t] = p
    for t in range(n):
        x[t] *= scale[t]


@jit
def score_tile(m: int, q: Any, rows: Any, scores: Any) -> None:
    """``scores[i, t] = q[i] . rows[t]`` for t < m; rows from m up to the next multiple of 4 are overwritten by
    zeros."""
    g, dim = q.shape
    # Four keys at a time: their sums are independent, and a query element is read once for all four.
    for t in range(m, (m + 3) // 4 * 4):
        for j in range(dim):
            rows[t, j] = 0.0
    for t in range(0, m, 4):
        k0, k1, k2, k3 = rows[t], rows[t + 1], rows[t + 2], rows[t + 3]
        for i in range(g):
            qi = q[i]
            s0 = s1 = s2 = s3 = np.float32(0.0)
            for j in range(dim):
                x = qi[j]
                s0 += x * k0[j]
                s1 += x * k1[j]
                s2 += x * k2[j]
                s3 += x * k3[j]
            scores[i, t] = s0
            scores[i, t + 1] = s1
            scores[i, t + 2] = s2
            scores[i, t + 3] = s3


@jit
def fold_tile(m: int, rows: Any, scores: Any, acc: Any, top: Any, total: Any, exp_bits: Any, exp_scale: Any) -> None:
    """Fold the values ``rows[:m]`` with ``scores`` (g, m) into the running softmax; both are overwritten."""
    g, dim = acc.shape
    for i in range(g):
        best = top[i]
        for t in range(m):
            best = max(best, scores[i, t])
        if best > top[i]:
            if total[i] > 0:
                shrink = np.exp(top[i] - best)
                total[i] *= shrink
                for j in range(dim):
                    acc[i, j] *= shrink
            top[i] = best
        for t in range(m):
            scores[i, t] -= best
        exp_in_place(scores[i], m, exp_bits, exp_scale)
        s = np.float32(0.0)
        for t in range(m):
            s += scores[i, t]
        total[i] += s
        for t in range(m, (m + 3) // 4 * 4):
            scores[i, t] = 0.0
    for t in range(m, (m + 3) // 4 * 4):
        for j in range(dim):
            rows[t, j] = 0.0
    for t in range(0, m, 4):
        v0, v1, v2, v3 = rows[t], rows[t + 1], rows[t + 2], rows[t + 3]
        for i in range(g):
            w0, w1, w2, w3 = scores[i, t], scores[i, t + 1], scores[i, t + 2], scores[i, t + 3]
            out = acc[i]
            for j in range(dim):
                out[j] += w0 * v0[j] + w1 * v1[j] + w2 * v2[j] + w3 * v3[j]


@jit
def attend_picked(
    mem16: Any,
    mem32: Any,
    dtype: int,
    starts: Any,
    value_delta: int,
    n: int,
    q: Any,
    acc: Any,
    top: Any,
    total: Any,
    rows: Any,
    rows_bits: Any,
    scores: Any,
    exp_bits: Any,
    exp_scale: Any,
) -> None:
    """Fold ``n <= TILE`` single rows into the running softmax of ``g`` queries.

    ``starts[t]`` is the element where key t begins, ``value_delta`` elements later begins its value; the other
    arguments are those of :func:`attend_rows`.
    """
    dim = q.shape[1]
    for t in range(n):
        load_rows(mem16, mem32, dtype, starts[t], 1, dim, rows[t : t + 1], rows_bits[t : t + 1])
    score_tile(n, q, rows, scores)
    for t in range(n):
        load_rows(mem16, mem32, dtype, starts[t] + value_delta, 1, dim, rows[t : t + 1], rows_bits[t : t + 1])
    fold_tile(n, rows, scores, acc, top, total, exp_bits, exp_scale)


@jit
def attend_rows(
    mem16: Any,
    mem32: Any,
    dtype: int,
    k_start: int,
    v_start: int,
    n: int,
    q: Any,
    acc: Any,
    top: Any,
    total: Any,
    rows: Any,
    rows_bits: Any,
    scores: Any,
    exp_bits: Any,
    exp_scale: Any,
) -> None:
    """Fold ``n`` keys and values into the running softmax of ``g`` queries.

    Args:
        mem16, mem32: uint16 and float32 views of the buffer that holds the rows.
        dtype: FLOAT32, BFLOAT16 or FLOAT16.
        k_start, v_start: element offsets of the first key and the first value; rows are dense.
        q: (g, d) float32 queries, already multiplied by the softmax scale.
        acc: (g, d) float32 running sum of exp(score - top) * value.
        top, total: (g,) float32 running maximum and sum; start at -inf and 0.
        rows, rows_bits: (TILE, d) float32 scratch and its uint32 view.
        scores, exp_bits, exp_scale: (g, TILE) float32, (TILE,) int32 and its float32 view.
    """
    dim = q.shape[1]
    done = 0
    while done < n:
        m = min(TILE, n - done)
        load_rows(mem16, mem32, dtype, k_start + done * dim, m, dim, rows, rows_bits)
        score_tile(m, q, rows, scores)
        load_rows(mem16, mem32, dtype, v_start + done * dim, m, dim, rows, rows_bits)
        fold_tile(m, rows, scores, acc, top, total, exp_bits, exp_scale)
        done += m


def scratch(g: int, dim: int) -> tuple[npt.NDArray[Any], ...]:
    """Scratch arrays for :func:`attend_rows`, in its argument order after ``total``."""
    rows = np.empty((TILE, dim), np.float32)
    exp_bits = np.empty(TILE, np.int32)
    return rows, rows.view(np.uint32), np.empty((g, TILE), np.float32), exp_bits, exp_bits.view(np.float32)
