"""Numba kernels over rows of keys and values in host memory.

A row is a key and its value side by side, 2 * d elements (float32, bfloat16 or float16 in a byte buffer). Rows are read
where they lie, converted a tile at a time into float32 scratch, and accumulated in float32 with the online softmax of
FlashAttention (arXiv 2205.14135, algorithm 1). All kernels release the GIL.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Codes for the element type of stored rows."""
DTYPE_CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
TILE = 64
"""Rows converted and scored at a time: a tile of 64 x 256 float32 stays in L2, a row of it in L1."""
AHEAD = 12
"""Rows fetched ahead of the one converted: single rows lie anywhere in memory."""

_LOG2E = np.float32(1.4426950408889634)
_LN2_HI = np.float32(0.693359375)
_LN2_LO = np.float32(-2.12194440e-4)
_TWO_112 = np.float32(5.192296858534828e33)
_BEYOND_HALF = np.float32(65536.0)

jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})


class Memory(NamedTuple):
    """A buffer of rows: its uint16 and float32 views, and the code of the element type they hold."""

    halves: npt.NDArray[np.uint16]
    words: npt.NDArray[np.float32]
    dtype: int


class Scratch(NamedTuple):
    """Memory of one thread, for ``g`` query heads of size d.

    Attributes:
        rows, bits: (TILE + 3, 2 * d) float32 and its uint32 view. scores: (g, TILE + 3) float32.
        exp_bits, exp_scale: (TILE + 3,) int32 and its float32 view.
    """

    rows: npt.NDArray[np.float32]
    bits: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]
    exp_bits: npt.NDArray[np.int32]
    exp_scale: npt.NDArray[np.float32]


class Running(NamedTuple):
    """A softmax under way over ``g`` query heads.

    Attributes:
        acc: (g, d) float32 sum of exp(score - top) * value. top, total: (g,) float32 running maximum and sum.
    """

    acc: npt.NDArray[np.float32]
    top: npt.NDArray[np.float32]
    total: npt.NDArray[np.float32]


def memory_of(buffer: npt.NDArray[Any], dtype: int) -> Memory:
    """Views of a contiguous buffer whose element type has the code ``dtype``."""
    raw = buffer.reshape(-1).view(np.uint8)
    return Memory(raw[: raw.size // 2 * 2].view(np.uint16), raw[: raw.size // 4 * 4].view(np.float32), dtype)


def scratch(g: int, dim: int) -> Scratch:
    """Memory for the kernels below."""
    rows = np.zeros((TILE + 3, 2 * dim), np.float32)
    exp_bits = np.zeros(TILE + 3, np.int32)
    return Scratch(rows, rows.view(np.uint32), np.zeros((g, TILE + 3), np.float32), exp_bits, exp_bits.view(np.float32))


def running(g: int, dim: int) -> Running:
    """A softmax over nothing."""
    return Running(np.zeros((g, dim), np.float32), np.full(g, -np.inf, np.float32), np.zeros(g, np.float32))


@intrinsic
def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of ``array[index]`` closer; nothing happens where it is not mapped."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(view.data, [args[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        name = "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [pointer, ir.Constant(word, 0), ir.Constant(word, 2), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@jit
def load(memory: Any, start: int, count: int, out: Any, bits: Any) -> None:
    """Convert ``count`` elements from element ``start`` on into ``out`` (float32); ``bits`` is its uint32 view."""
    # Slices first: an index whose sign the compiler does not know keeps the loops from vectorising.
    if memory.dtype == FLOAT32:
        words = memory.words[start : start + count]
        for j in range(count):
            out[j] = words[j]
        return
    halves = memory.halves[start : start + count]
    if memory.dtype == BFLOAT16:  # the upper half of a float32
        for j in range(count):
            bits[j] = np.uint32(halves[j]) << np.uint32(16)
        return
    for j in range(count):  # float16: shift the fields into place, then correct the exponent bias
        h = np.uint32(halves[j])
        bits[j] = ((h & np.uint32(0x8000)) << np.uint32(16)) | ((h & np.uint32(0x7FFF)) << np.uint32(13))
    for j in range(count):
        x = out[j] * _TWO_112
        # The largest exponent stands for inf and NaN, which came out as 65536 and more.
        out[j] = (
            x if abs(x) < _BEYOND_HALF else (x * np.float32(np.inf) if abs(x) == _BEYOND_HALF else np.float32(np.nan))
        )


@jit
def exp_in_place(x: Any, n: int, bits: Any, scale: Any) -> None:
    """``x[:n] = exp(x[:n])`` for x <= 0, without a libm call so that it vectorises.

    ``bits``/``scale`` are an int32 scratch row and its float32 view. Relative error below 3e-7; below exp(-87) it stays
    there.
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
def _score(m: int, q: Any, rows: Any, scores: Any) -> None:
    """``scores[i, t] = q[i] . rows[t, :d]`` for t < m; up to three rows beyond m are scored, too."""
    g, dim = q.shape
    # Four keys at a time: their sums are independent, and a query element is read once for all four.
    for t in range(0, m, 4):
        k0, k1, k2, k3 = rows[t, :dim], rows[t + 1, :dim], rows[t + 2, :dim], rows[t + 3, :dim]
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
def _fold(m: int, work: Any, run: Any) -> None:
    """Fold the values ``rows[:m, d:]`` with ``scores`` (g, m) into the running softmax; scores are overwritten."""
    g, dim = run.acc.shape
    for i in range(g):
        scores = work.scores[i]
        best = run.top[i]
        for t in range(m):
            best = max(best, scores[t])
        if best == -np.inf:
            best = np.float32(0.0)  # keys of weight zero
        elif best > run.top[i]:
            if run.total[i] > 0:
                shrink = np.exp(run.top[i] - best)
                run.total[i] *= shrink
                for j in range(dim):
                    run.acc[i, j] *= shrink
            run.top[i] = best
        for t in range(m):
            scores[t] -= best
        exp_in_place(scores, m, work.exp_bits, work.exp_scale)
        s = np.float32(0.0)
        for t in range(m):
            s += scores[t]
        run.total[i] += s
        for t in range(m, (m + 3) // 4 * 4):
            scores[t] = 0.0
    for t in range(m, (m + 3) // 4 * 4):
        for j in range(dim):
            work.rows[t, dim + j] = 0.0
    for t in range(0, m, 4):
        v0, v1, v2, v3 = work.rows[t, dim:], work.rows[t + 1, dim:], work.rows[t + 2, dim:], work.rows[t + 3, dim:]
        for i in range(g):
            scores = work.scores[i]
            w0, w1, w2, w3 = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
            out = run.acc[i]
            for j in range(dim):
                out[j] += w0 * v0[j] + w1 * v1[j] + w2 * v2[j] + w3 * v3[j]


@jit
def attend_run(memory: Any, start: int, n: int, q: Any, run: Any, work: Any) -> None:
    """Fold ``n`` rows that lie one after the other, the first at element ``start``, into the running softmax.

    Args:
        memory: a Memory. q: (g, d) float32 queries, multiplied by the softmax scale. run: a Running. work: a Scratch.
    """
    width = 2 * q.shape[1]
    done = 0
    flat, flat_bits = work.rows.reshape(-1), work.bits.reshape(-1)
    while done < n:
        m = min(TILE, n - done)
        load(memory, start + done * width, m * width, flat, flat_bits)
        _score(m, q, work.rows, work.scores)
        _fold(m, work, run)
        done += m


@jit
def attend_picked(memory: Any, starts: Any, log_pi: Any, n: int, q: Any, run: Any, work: Any) -> None:
    """Fold ``n`` single rows, each weighted ``exp(-log_pi)``, into the running softmax.

    ``starts[t]`` is the element where row t begins; the other arguments are those of :func:`attend_run`.
    """
    g, dim = q.shape
    width = 2 * dim
    per_line = 16 if memory.dtype == FLOAT32 else 32
    done = 0
    while done < n:
        m = min(TILE, n - done)
        for t in range(m):
            ahead = done + t + AHEAD
            if ahead < n:
                for line in range(0, width, per_line):
                    if memory.dtype == FLOAT32:
                        _prefetch(memory.words, starts[ahead] + line)
                    else:
                        _prefetch(memory.halves, starts[ahead] + line)
            load(memory, starts[done + t], width, work.rows[t], work.bits[t])
        _score(m, q, work.rows, work.scores)
        for i in range(g):
            for t in range(m):
                work.scores[i, t] -= log_pi[done + t]
        _fold(m, work, run)
        done += m


@jit
def finish(run: Any, out: Any, lse: Any) -> None:
    """Write what a running softmax comes to: (g, d) output and (g,) natural log-sum-exp; zeros and -inf if empty."""
    g, dim = run.acc.shape
    for i in range(g):
        if run.total[i] == 0:
            lse[i] = -np.inf
            for j in range(dim):
                out[i, j] = 0.0
        else:
            lse[i] = run.top[i] + np.log(run.total[i])
            for j in range(dim):
                out[i, j] = run.acc[i, j] / run.total[i]


def attend_exactly(rows: npt.NDArray[Any], queries: npt.NDArray[np.float32], scale: float) -> Any:
    """Exact attention of ``queries`` (g, d) over ``rows`` (n, 2, d), float16 or float32.

    Returns:
        (g, d) output and (g,) natural log-sum-exp; zeros and -inf if there are no rows.
    """
    g, dim = queries.shape
    out, lse = np.empty((g, dim), np.float32), np.empty(g, np.float32)
    run = running(g, dim)
    if len(rows):
        code = FLOAT16 if rows.itemsize == 2 else FLOAT32
        scaled = np.ascontiguousarray(queries, np.float32) * np.float32(scale)
        attend_run(memory_of(np.ascontiguousarray(rows), code), 0, len(rows), scaled, run, scratch(g, dim))
    finish(run, out, lse)
    return out, lse
