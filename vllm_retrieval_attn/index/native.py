# SPDX-License-Identifier: Apache-2.0
"""Faiss's range search by its address, so that compiled code calls it without Python's lock.

Faiss's own Python wrapper gives the lock away for the search and takes it back afterwards. With several threads that
costs more than the search: each hand-over wakes a thread, 50 microseconds on a virtual machine, where a shard is
searched in 60. Measured on 16 cores, see docs/benchmarks.md (2026-11-25): 14 threads were no faster than one.

The functions are C++ and named as compilers of Linux name them; the index is the one that Faiss's wrapper made. Where
the results lie in ``faiss::RangeSearchResult`` (faiss/impl/AuxIndexStructures.h) is tried once, at start.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_retrieval_attn.index.rows import jit

_SYMBOLS = (
    "_ZNK5faiss16IndexIVFFastScan12range_searchElPKffPNS_17RangeSearchResultEPKNS_16SearchParametersE",
    "_ZN5faiss17RangeSearchResultC1Emb",
    "_ZN5faiss17RangeSearchResultD1Ev",
)
_RESULT_WORDS = 8
"""8-byte words of a RangeSearchResult and a little more: its table of functions, then the number of queries and the
addresses of limits, labels and distances."""
_LIMITS, _LABELS, _DISTANCES = 2, 3, 4
_I64 = ir.IntType(64)


class Native(NamedTuple):
    """Addresses of ``faiss::IndexIVFFastScan::range_search(long, const float*, float, RangeSearchResult*, ...) const``,
    and of the constructor and the destructor of its result."""

    search: int
    construct: int
    destroy: int


@intrinsic
def _call_search(typingctx: Any, function: Any, index: Any, n: Any, queries: Any, result: Any) -> Any:
    """What scores 0 and more; all arguments are int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I64, ir.FloatType(), _I64, _I64])
        target = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(target, [*args[1:4], ir.Constant(ir.FloatType(), 0.0), args[4], ir.Constant(_I64, 0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def _call_construct(typingctx: Any, function: Any, result: Any, n: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, ir.IntType(8)])
        target = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(target, [args[1], args[2], ir.Constant(ir.IntType(8), 1)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _call_destroy(typingctx: Any, function: Any, result: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), codegen


@intrinsic
def pointer_to(typingctx: Any, address: Any) -> Any:
    """An address as the pointer that ``numba.carray`` takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@jit
def best_of(values: Any, most: int) -> Any:
    """The least of the best ``most`` values, and how many of those that are alike are among them."""
    order = np.sort(values)[len(values) - most :]
    return order[0], most - np.sum(order > order[0])


@jit
def search_above(native: Any, index: int, queries: Any, most: int, scores: Any, ids: Any, starts: Any) -> None:
    """All keys that score 0 and more for each query, in the order of the keys; the best ``most`` where there are more.

    Args:
        native: addresses. index: of an IndexIVFPQFastScan with one list. queries: (n, d) float32, contiguous.
        scores, ids: (n * most,) float32 and int32, written. starts: (n + 1,) int64, written: where each query's begin.
    """
    n = len(queries)
    room = np.empty(_RESULT_WORDS, np.int64)
    _call_construct(native.construct, room.ctypes.data, n)
    _call_search(native.search, index, n, queries.ctypes.data, room.ctypes.data)
    limits = numba.carray(pointer_to(room[_LIMITS]), (n + 1,), np.int64)
    labels = numba.carray(pointer_to(room[_LABELS]), (limits[n],), np.int64)
    found = numba.carray(pointer_to(room[_DISTANCES]), (limits[n],), np.float32)
    at = 0
    for i in range(n):
        starts[i] = at
        first, last = limits[i], limits[i + 1]
        least, ties = np.float32(-np.inf), 0
        if last - first > most:
            least, ties = best_of(found[first:last], most)
        for c in range(first, last):
            if found[c] == least:
                ties -= 1
            if found[c] > least or (found[c] == least and ties >= 0):
                scores[at], ids[at] = found[c], labels[c]
                at += 1
    starts[n] = at
    _call_destroy(native.destroy, room.ctypes.data)


@cache
def native() -> Native:
    """Where the functions lie in this process.

    Raises:
        RuntimeError: this build of Faiss does not show them, or answers otherwise through them than through Python.
    """
    library = ctypes.CDLL(str(Path(faiss.__file__).with_name("libfaiss.so")))
    problem = f"retrieval: faiss-cpu {faiss.__version__} can not be called without Python; install faiss-cpu 1.15.1"
    try:
        found = Native(*(int(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0) for name in _SYMBOLS))
    except AttributeError:
        raise RuntimeError(problem) from None
    if not _answers_alike(found):
        raise RuntimeError(problem)
    return found


def _answers_alike(functions: Native) -> bool:
    dim, most = 8, 64
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(np.zeros((1, dim), np.float32))
    index: Any = faiss.IndexIVFPQFastScan(quantizer, dim, 1, dim, 4, faiss.METRIC_INNER_PRODUCT)
    keys = np.sin(np.arange(64 * dim, dtype=np.float32)).reshape(64, dim)
    index.by_residual = False
    faiss.copy_array_to_vector(np.tile(np.linspace(-1, 1, 16, dtype=np.float32), dim), index.pq.centroids)
    index.is_trained = True
    index.add(keys)
    limits, scores, ids = index.range_search(keys[:3], 0.0)
    mine = np.zeros(3 * most, np.float32), np.zeros(3 * most, np.int32), np.zeros(4, np.int64)
    search_above(functions, object_address(index), keys[:3], most, *mine)
    last = int(limits[3])
    return bool(
        np.array_equal(mine[2], limits)
        and np.array_equal(mine[0][:last], scores)
        and np.array_equal(mine[1][:last], ids)
        and last > 0
    )


def object_address(index: Any) -> int:
    """Where a Faiss index lies that its Python wrapper holds."""
    return int(index.this)
