# SPDX-License-Identifier: Apache-2.0
"""Writing LLVM code for callers compiled by Numba: loads, loops, functions. Addresses are int64."""

from typing import Any

from llvmlite import ir

F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))


def number(value: int) -> Any:
    return ir.Constant(I64, value)


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def broadcast(builder: Any, value: Any, lanes: int = 16) -> Any:
    """A vector that has ``value`` in all its places."""
    kind, places = ir.VectorType(value.type, lanes), ir.VectorType(I32, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(places, [0] * lanes))


def call(builder: Any, name: str, *values: Any, result: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call an operation of LLVM's own."""
    kind = ir.FunctionType(result, [value.type for value in values])
    operation = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(operation, values, fastmath=fastmath)


def fetch(builder: Any, pointer: Any) -> None:
    """Bring the cache line that a pointer to bytes names closer; nothing happens where it is not mapped."""
    hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # to be read, again, data
    call(builder, "llvm.prefetch.p0i8", pointer, *hints, result=ir.VoidType())


def loop(builder: Any, first: Any, end: Any, step: int, carried: list[Any], body: Any) -> list[Any]:
    """``for i in range(first, end, step)``: ``body(i, values)`` returns what ``carried`` becomes."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(first, before)
    values = [builder.phi(value.type) for value in carried]
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, end), inside, after)
    builder.position_at_end(inside)
    found = body(index, values)
    index.add_incoming(builder.add(index, number(step)), builder.block)
    for phi, value in zip(values, found, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def function(module: Any, name: str, arguments: int, write: Any) -> Any:
    """A function of int64 arguments, written once a module."""
    if name in module.globals:
        return module.globals[name]
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    made.linkage = "internal"
    builder = ir.IRBuilder(made.append_basic_block("entry"))
    write(builder, *made.args)
    builder.ret_void()
    return made
