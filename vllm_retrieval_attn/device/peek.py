# SPDX-License-Identifier: Apache-2.0
"""Single numbers at addresses that another side writes, for callers compiled by Numba. Nothing is checked."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.index.llvm import F32, I8, I16, I64, fetch, load


@intrinsic
def peek64(typingctx: Any, address: Any) -> Any:
    """int64, aligned. What the writer wrote before it is seen by loads after it; never kept in a register."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def poke64(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64, aligned, after all that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load16(typingctx: Any, address: Any) -> Any:
    """uint16, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(load(builder, args[0], I16, 2), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def load32(typingctx: Any, address: Any) -> Any:
    """float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], F32, 4)

    return types.float32(types.int64), codegen


@intrinsic
def touch(typingctx: Any, address: Any) -> Any:
    """Bring a cache line closer, without waiting for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fetch(builder, builder.inttoptr(args[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen
