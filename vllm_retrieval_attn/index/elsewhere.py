# SPDX-License-Identifier: Apache-2.0
"""Rows that lie in another process, copied from there and attended to by index/rows.py.

A server with a GPU keeps its pages in memory that only its own process can map (store/managed.py). Linux copies from
one process into another without help of the other one (process_vm_readv).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.index.rows import FLOAT32, TILE, Memory, attend_picked, attend_run, jit, load, memory_of

COPIED = 4 * TILE
"""Rows copied at a time: whole tiles, so that sums run in the same order as over rows at hand."""
_I64 = ir.IntType(64)


class Source(NamedTuple):
    """Rows at hand, or elsewhere.

    Attributes:
        memory: the rows, if they are at hand. pid: process that has them, 0: this one.
        address: of element 0 there.
    """

    memory: Memory
    pid: int
    address: int


class Copies(NamedTuple):
    """Memory of one thread for COPIED rows of 2 * d elements.

    Attributes:
        rows: the copies, one after the other. starts: (COPIED,) int64, where each begins.
        vectors: (1 + COPIED, 2) int64, addresses and bytes: of the copies, and of what is copied.
    """

    rows: Memory
    starts: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.int64]


def source_of(buffer: npt.NDArray[Any], dtype: int, pid: int = 0, address: int = 0) -> Source:
    """Rows of the element type ``dtype`` (index/rows.py) in ``buffer``, or at ``address`` of process ``pid``."""
    return Source(memory_of(buffer, dtype), pid, address)


def copies(dim: int, dtype: int) -> Copies:
    """Memory for the kernels below."""
    width = 2 * dim
    buffer = np.zeros(COPIED * width * (4 if dtype == FLOAT32 else 2), np.uint8)
    return Copies(memory_of(buffer, dtype), np.arange(COPIED) * width, np.zeros((1 + COPIED, 2), np.int64))


@intrinsic
def _process_vm_readv(typingctx: Any, pid: Any, local: Any, remote: Any, count: Any) -> Any:
    """Copy ``count`` pieces of another process into one here; bytes copied, -1 on error. Arguments are int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [ir.IntType(32), *[_I64] * 5])
        name = "process_vm_readv"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        one, none = ir.Constant(_I64, 1), ir.Constant(_I64, 0)
        return builder.call(function, [builder.trunc(args[0], ir.IntType(32)), args[1], one, args[2], args[3], none])

    return types.int64(*[types.int64] * 4), codegen


@jit
def _copy(source: Any, starts: Any, count: int, width: int, work: Any) -> bool:
    """Copy ``count`` pieces of ``width`` elements, which begin at elements ``starts``; False if that failed."""
    size = 4 if source.memory.dtype == FLOAT32 else 2
    vectors = work.vectors
    vectors[0, 0], vectors[0, 1] = work.rows.halves.ctypes.data, count * width * size
    for t in range(count):
        vectors[1 + t, 0], vectors[1 + t, 1] = source.address + starts[t] * size, width * size
    place = vectors.ctypes.data
    return _process_vm_readv(source.pid, place, place + 16, count) == vectors[0, 1]


@jit
def attend_picked_from(source: Any, starts: Any, log_pi: Any, n: int, q: Any, run: Any, work: Any, held: Any) -> bool:
    """As index/rows.py's ``attend_picked``; False if the rows can not be copied. ``held``: Copies."""
    if source.pid == 0:
        attend_picked(source.memory, starts, log_pi, n, q, run, work)
        return True
    for first in range(0, n, COPIED):
        count = min(COPIED, n - first)
        if not _copy(source, starts[first : first + count], count, 2 * q.shape[1], held):
            return False
        attend_picked(held.rows, held.starts, log_pi[first : first + count], count, q, run, work)
    return True


@jit
def attend_run_from(source: Any, start: int, n: int, q: Any, run: Any, work: Any, held: Any) -> bool:
    """As index/rows.py's ``attend_run``; False if the rows can not be copied. ``held``: Copies."""
    if source.pid == 0:
        attend_run(source.memory, start, n, q, run, work)
        return True
    width = 2 * q.shape[1]
    one = np.empty(1, np.int64)
    for first in range(0, n, COPIED):
        count = min(COPIED, n - first)
        one[0] = start + first * width
        if not _copy(source, one, 1, count * width, held):
            return False
        attend_run(held.rows, 0, count, q, run, work)
    return True


@jit
def load_keys(source: Any, start: int, held: Any, out: Any) -> bool:
    """Keys of rows that lie one after the other, the first at element ``start``, into ``out`` (n, d) float32; False if
    they can not be copied. ``held``: Copies."""
    n, dim = out.shape
    one = np.empty(1, np.int64)
    for first in range(0, n, COPIED):
        count, memory, at = min(COPIED, n - first), source.memory, start + first * 2 * dim
        if source.pid != 0:
            one[0] = at
            if not _copy(source, one, 1, count * 2 * dim, held):
                return False
            memory, at = held.rows, 0
        for t in range(count):
            load(memory, at + t * 2 * dim, dim, out[first + t])
    return True


@jit
def load_paged_keys(source: Any, table: Any, pages: Any, base: int, first: int, held: Any, out: Any) -> bool:
    """Keys of tokens ``first`` and following, as :func:`load_keys`; token 0 lies in page ``table[0]``.

    Args:
        table: (n,) int64 pages. pages: (2,) int64, tokens and elements of a page. base: element of a page where its
            rows begin.
    """
    n, dim = out.shape
    tokens, elements = pages
    done = 0
    while done < n:
        page, offset = (first + done) // tokens, (first + done) % tokens
        count = min(tokens - offset, n - done)
        start = table[page] * elements + base + offset * 2 * dim
        if not load_keys(source, start, held, out[done : done + count]):
            return False
        done += count
    return True


def read_bytes(source: Source, start: int, out: npt.NDArray[np.uint8]) -> None:
    """Copy what lies from element ``start`` on into ``out`` (contiguous).

    Raises:
        OSError: it can not be copied.
    """
    size = 4 if source.memory.dtype == FLOAT32 else 2
    if source.pid == 0:
        out[:] = source.memory.halves.view(np.uint8)[start * size : start * size + len(out)]
        return
    vectors = np.array([[out.ctypes.data, len(out)], [source.address + start * size, len(out)]], np.int64)
    if _read(source.pid, vectors) != len(out):
        raise OSError(f"retrieval: the memory of process {source.pid} can not be read")


@jit
def _read(pid: int, vectors: Any) -> int:
    return _process_vm_readv(pid, vectors.ctypes.data, vectors.ctypes.data + 16, 1)


def check_readable(source: Source) -> None:
    """See whether this process may read the other's memory.

    Raises:
        PermissionError: the system does not let it; the text says what to do.
    """
    try:
        read_bytes(source, 0, np.zeros(8, np.uint8))
    except OSError as error:
        raise PermissionError(
            f"retrieval: the CPU workers may not read the memory of the serving process {source.pid} "
            "(process_vm_readv): allow it in the container's seccomp profile, set kernel.yama.ptrace_scope to 0 or 1, "
            "or set sketch_gb to 0"
        ) from error
