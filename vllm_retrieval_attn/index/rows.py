# SPDX-License-Identifier: Apache-2.0
"""Numba kernels over rows of keys and values in host memory.

A row is a key and its value side by side, 2 * d elements (float32, bfloat16 or float16 in a byte buffer); d is a
multiple of 16 (index/vector.py). Rows are read where they lie, a tile at a time, and accumulated in float32 with the
online softmax of FlashAttention (arXiv 2205.14135, algorithm 1). All kernels release the GIL.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.core.caches import keep_compiled
from vllm_retrieval_attn.index.llvm import fetch
from vllm_retrieval_attn.index.vector import add_values, dots, exponentials, soften, widen

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Codes for the element type of stored rows, as in index/vector.py."""
DTYPE_CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
TILE = 32
"""Rows scored at a time: they are still in L1 when their values are added up."""
AHEAD = 16
"""Rows fetched ahead of the one scored: single rows lie anywhere in memory."""


keep_compiled()
jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})


class Memory(NamedTuple):
    """A buffer of rows: its uint16 and float32 views, and the code of the element type they hold."""

    halves: npt.NDArray[np.uint16]
    words: npt.NDArray[np.float32]
    dtype: int


class Scratch(NamedTuple):
    """Memory of one thread, for ``g`` query heads of size d.

    Attributes:
        starts: (TILE,) int64. scores: (g, TILE), log_pi: (TILE,), sum: (1,) float32.
    """

    starts: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    log_pi: npt.NDArray[np.float32]
    sum: npt.NDArray[np.float32]


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


def scratch(g: int) -> Scratch:
    """Memory for the kernels below."""
    scores, log_pi, total = (np.zeros(shape, np.float32) for shape in ((g, TILE), TILE, 1))
    return Scratch(np.zeros(TILE, np.int64), scores, log_pi, total)


def running(g: int, dim: int) -> Running:
    """A softmax over nothing."""
    return Running(np.zeros((g, dim), np.float32), np.full(g, -np.inf, np.float32), np.zeros(g, np.float32))


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of ``array[index]`` closer; nothing happens where it is not mapped."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(view.data, [args[1]]), ir.IntType(8).as_pointer())
        fetch(builder, pointer)
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@jit
def fetch_row(memory: Any, start: int, width: int) -> None:
    """Bring ``width`` elements from element ``start`` on closer, without waiting for them."""
    if memory.dtype == FLOAT32:
        for line in range(0, width, 16):
            prefetch(memory.words, start + line)
    else:
        for line in range(0, width, 32):
            prefetch(memory.halves, start + line)


@jit
def _base(memory: Any) -> int:
    """Address of element 0."""
    return memory.halves.ctypes.data


@jit
def load(memory: Any, start: int, count: int, out: Any) -> None:
    """Convert ``count`` elements, a multiple of 16, from element ``start`` on into ``out`` (float32, contiguous)."""
    size = 4 if memory.dtype == FLOAT32 else 2
    widen(_base(memory) + start * size, memory.dtype, count, np.float32(1), out.ctypes.data)


@jit
def exp_in_place(x: Any, n: int) -> None:
    """``x[:n] = exp(x[:n])`` for float32 x <= 0, contiguous; see index/vector.py, ``exponentials``."""
    exponentials(x.ctypes.data, n)


@jit
def _raise(m: int, work: Any, run: Any) -> None:
    """Turn ``scores`` (g, m) less ``log_pi`` into exponentials within the running softmax, whose sums shrink to its new
    maximum."""
    g, dim = run.acc.shape
    tops, total, log_pi = run.top.ctypes.data, work.sum.ctypes.data, work.log_pi.ctypes.data
    for i in range(g):
        before = run.top[i]
        soften(work.scores.ctypes.data + 4 * TILE * i, log_pi, m, tops + 4 * i, total)
        if run.top[i] > before and run.total[i] > 0:
            shrink = np.exp(before - run.top[i])
            run.total[i] *= shrink
            for j in range(dim):
                run.acc[i, j] *= shrink
        run.total[i] += work.sum[0]


@jit
def _score_tile(memory: Any, starts: Any, first: int, m: int, n: int, q: Any, work: Any) -> None:
    """Scores of rows ``starts[first : first + m]``; rows up to ``n`` are fetched ahead."""
    g, dim = q.shape
    size = 4 if memory.dtype == FLOAT32 else 2
    base, queries, scores = _base(memory), q.ctypes.data, work.scores.ctypes.data
    for t in range(m):
        if first + t + AHEAD < n:
            fetch_row(memory, starts[first + t + AHEAD], 2 * dim)
        dots(base + starts[first + t] * size, memory.dtype, queries, g, dim, scores + 4 * t, TILE)


@jit
def _add_tile(memory: Any, starts: Any, first: int, m: int, work: Any, run: Any) -> None:
    """Add the values of rows ``starts[first : first + m]``, weighted by the scores raised."""
    g, dim = run.acc.shape
    at = starts.ctypes.data + 8 * first
    add_values(_base(memory), memory.dtype, at, m, dim, work.scores.ctypes.data, TILE, g, run.acc.ctypes.data)


@jit
def attend_run(memory: Any, start: int, n: int, q: Any, run: Any, work: Any) -> None:
    """Fold ``n`` rows that lie one after the other, the first at element ``start``, into the running softmax.

    Args:
        memory: a Memory. q: (g, d) float32 queries, multiplied by the softmax scale, contiguous. run: a Running.
        work: a Scratch.
    """
    width = 2 * q.shape[1]
    for t in range(min(n, TILE)):
        work.log_pi[t] = 0.0
    done = 0
    while done < n:
        m = min(TILE, n - done)
        for t in range(m):
            work.starts[t] = start + (done + t) * width
        _score_tile(memory, work.starts, 0, m, m, q, work)
        _raise(m, work, run)
        _add_tile(memory, work.starts, 0, m, work, run)
        done += m


@jit
def attend_picked(memory: Any, starts: Any, log_pi: Any, n: int, q: Any, run: Any, work: Any) -> None:
    """Fold ``n`` single rows, each weighted ``exp(-log_pi)``, into the running softmax.

    ``starts[t]`` is the element where row t begins, contiguous int64; the other arguments are those of
    :func:`attend_run`.
    """
    for t in range(min(n, AHEAD)):
        fetch_row(memory, starts[t], 2 * q.shape[1])
    done = 0
    while done < n:
        m = min(TILE, n - done)
        _score_tile(memory, starts, done, m, n, q, work)
        for t in range(m):
            work.log_pi[t] = log_pi[done + t]
        _raise(m, work, run)
        _add_tile(memory, starts, done, m, work, run)
        done += m


@jit
def clear(run: Any) -> None:
    """Make a softmax one over nothing."""
    run.acc[:] = 0.0
    run.top[:] = -np.inf
    run.total[:] = 0.0


@jit
def keep(run: Any, part: Any) -> None:
    """Write a running softmax into a partial result (g, d + 2)."""
    d = run.acc.shape[1]
    part[:, :d] = run.acc
    part[:, d] = run.top
    part[:, d + 1] = run.total


@jit
def add_parts(parts: Any, run: Any) -> None:
    """Add partial results (n, g, d + 2), in order, to a running softmax."""
    n, g, d = len(parts), parts.shape[1], run.acc.shape[1]
    for u in range(n):
        part = parts[u]
        for i in range(g):
            if part[i, d + 1] == 0.0:
                continue
            top = max(run.top[i], part[i, d])
            old, new = np.exp(run.top[i] - top), np.exp(part[i, d] - top)
            for j in range(d):
                run.acc[i, j] = run.acc[i, j] * old + part[i, j] * new
            run.total[i] = run.total[i] * old + part[i, d + 1] * new
            run.top[i] = top


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
        attend_run(memory_of(np.ascontiguousarray(rows), code), 0, len(rows), scaled, run, scratch(g))
    finish(run, out, lse)
    return out, lse
