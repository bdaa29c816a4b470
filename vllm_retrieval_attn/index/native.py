"""Faiss's search by its address, so that compiled code calls it without Python's lock.

Faiss's own Python wrapper gives the lock away for the search and takes it back afterwards. With several threads that
costs more than the search: each hand-over wakes a thread, 50 microseconds on a virtual machine, where a shard is
searched in 80 to 150. Measured on 16 cores, see docs/benchmarks.md (2026-11-25): 14 threads
were no faster than one.

The function is C++ and named as compilers of Linux name it; the object is the one that Faiss's wrapper made.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import faiss
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_SEARCH = "_ZNK5faiss13IndexFastScan6searchElPKflPfPlPKNS_16SearchParametersE"
"""``faiss::IndexFastScan::search(long, const float*, long, float*, long*, const SearchParameters*) const``."""
_I64 = ir.IntType(64)


@cache
def search_address() -> int:
    """Where the function lies in this process.

    Raises:
        RuntimeError: this build of Faiss does not show it.
    """
    library = ctypes.CDLL(str(Path(faiss.__file__).with_name("libfaiss.so")))
    try:
        function = getattr(library, _SEARCH)
    except AttributeError:
        raise RuntimeError(
            f"retrieval: faiss-cpu {faiss.__version__} does not export IndexFastScan::search; install faiss-cpu 1.15.1"
        ) from None
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def object_address(index: Any) -> int:
    """Where a Faiss index lies that its Python wrapper holds."""
    return int(index.this)


@intrinsic
def search_fastscan(
    typingctx: Any, function: Any, index: Any, n: Any, queries: Any, k: Any, scores: Any, ids: Any
) -> Any:
    """The best k keys of n queries; all arguments are int64.

    ``function`` and ``index`` are addresses as above; ``queries``, ``scores`` and ``ids`` those of contiguous arrays
    (n, d) float32, (n, k) float32 and (n, k) int64.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 7)
        target = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(target, [*args[1:], ir.Constant(_I64, 0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen
