# SPDX-License-Identifier: Apache-2.0
"""Waiting and waking across processes, callable from Numba code without the GIL.

The primitives of the shared-memory ring: a full fence, a clock, ``sched_yield`` and the Linux futex
(wait for a 32-bit word to change, wake who waits). C symbols are named in the generated code
rather than taken through ctypes, so that Numba can cache the callers on disk.
"""

import platform
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_retrieval_attn.core.caches import keep_compiled

keep_compiled()
_I32, _I64 = ir.IntType(32), ir.IntType(64)
FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # not FUTEX_PRIVATE: the word is shared between processes


def check_platform() -> None:
    """Refuse a machine whose futex call number is not known."""
    if FUTEX_NUMBER < 0:
        raise RuntimeError(f"retrieval: processor {platform.machine()!r} is not supported; use x86_64 or aarch64 Linux")


def _symbol(builder: Any, name: str, function_type: Any) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)


@intrinsic
def fence(typingctx: Any) -> Any:
    """Sequentially consistent memory fence; also keeps the compiler from caching a polled word."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def sched_yield(typingctx: Any) -> Any:
    """Let another thread of this core run."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_symbol(builder, "sched_yield", ir.FunctionType(_I32, [])), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def read_clock_ns(typingctx: Any) -> Any:
    """CLOCK_MONOTONIC in nanoseconds (int64), comparable with ``time.monotonic_ns()``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # In the function's entry block: an alloca here would grow the stack at every turn of a polling loop.
        slot = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        timespec = builder.bitcast(slot, ir.PointerType(_I64))
        function = _symbol(builder, "clock_gettime", ir.FunctionType(_I32, [_I32, ir.PointerType(_I64)]))
        builder.call(function, [ir.Constant(_I32, 1), timespec])
        seconds = builder.load(timespec)
        nanos = builder.load(builder.gep(timespec, [ir.Constant(_I32, 1)]))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, 1_000_000_000)), nanos)

    return types.int64(), codegen


def _futex_call(builder: Any, address: Any, operation: int, value: Any, timeout: Any) -> None:
    function = _symbol(builder, "syscall", ir.FunctionType(_I64, [_I64] * 7))
    zero = ir.Constant(_I64, 0)
    builder.call(
        function,
        [ir.Constant(_I64, FUTEX_NUMBER), address, ir.Constant(_I64, operation), value, timeout, zero, zero],
    )


@intrinsic
def futex_wait(typingctx: Any, address: Any, value: Any, timeout: Any) -> Any:
    """Sleep while the int32 at ``address`` equals ``value``; ``timeout`` is the address of a timespec."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _futex_call(builder, args[0], _FUTEX_WAIT, args[1], args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def futex_wake(typingctx: Any, address: Any) -> Any:
    """Wake every thread, in any process, that sleeps on the int32 at ``address``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(_I64, 0)
        _futex_call(builder, args[0], _FUTEX_WAKE, ir.Constant(_I64, 0x7FFFFFFF), zero)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@numba.njit(cache=True)
def full_fence() -> None:
    """:func:`fence` for Python code."""
    fence()


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at ``address``, as one step for all threads; returns what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen
