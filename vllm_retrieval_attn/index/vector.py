# SPDX-License-Identifier: Apache-2.0
"""Vector code over rows of keys and values, as LLVM: Numba's own loops need copies that are converted before.
LLVM fits vectors of 16 numbers to whatever the processor has.

For callers compiled by Numba. Addresses are int64; nothing is checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from vllm_retrieval_attn.index.llvm import F32, I16, I32, I64, broadcast, call, function, load, loop, number

LANES = 16
"""Numbers of a vector; head sizes must be a multiple."""
_VECTOR = ir.VectorType(F32, LANES)
_FLOAT32, _BFLOAT16, _FLOAT16 = 0, 1, 2
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269502162933349609375, 0.693359375, -2.12194441119208931923e-4
_POLYNOMIAL = (
    1.98756915051490068436e-4, 1.39819970354437828064e-3, 8.33345204591751098633e-3, 4.16657962882518768311e-2,
    1.66666656732559204102e-1, 0.5,
)  # fmt: skip
"""float32 numbers, written out: LLVM takes no others."""
_NAMES = {_FLOAT32: "f32", _BFLOAT16: "bf16", _FLOAT16: "f16"}
_SIZES = {_FLOAT32: 4, _BFLOAT16: 2, _FLOAT16: 2}


def _elements(builder: Any, address: Any, dtype: int) -> Any:
    """16 stored elements as float32."""
    if dtype == _FLOAT32:
        return load(builder, address, _VECTOR, 4)
    if dtype == _FLOAT16:
        halves = load(builder, address, ir.VectorType(ir.HalfType(), LANES), 2)
        return builder.fpext(halves, _VECTOR)
    halves = load(builder, address, ir.VectorType(I16, LANES), 2)
    wide = builder.zext(halves, ir.VectorType(I32, LANES))
    sixteen = ir.Constant(ir.VectorType(I32, LANES), [16] * LANES)
    return builder.bitcast(builder.shl(wide, sixteen), _VECTOR)


def _same(value: float) -> Any:
    return ir.Constant(_VECTOR, [value] * LANES)


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fma.v{LANES}f32", a, b, c, result=_VECTOR)


def _summed(builder: Any, vector: Any) -> Any:
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    return call(builder, name, ir.Constant(F32, -0.0), vector, result=F32, fastmath=("reassoc",))


def _largest(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _exponential(builder: Any, x: Any) -> Any:
    """exp(x) for x <= 0, to 3e-7; below exp(-87) it stays there."""
    v = _largest(builder, x, _same(-87.0))
    k = call(builder, f"llvm.floor.v{LANES}f32", _fused(builder, v, _same(_LOG2E), _same(0.5)), result=_VECTOR)
    minus = builder.fsub(_same(0.0), k)
    r = _fused(builder, minus, _same(_LN2_LOW), _fused(builder, minus, _same(_LN2_HIGH), v))
    p = _same(_POLYNOMIAL[0])
    for factor in _POLYNOMIAL[1:]:
        p = _fused(builder, p, r, _same(factor))
    p = builder.fadd(_fused(builder, p, builder.fmul(r, r), r), _same(1.0))
    integers = ir.VectorType(I32, LANES)
    biased = builder.add(builder.fptosi(k, integers), ir.Constant(integers, [127] * LANES))
    power = builder.bitcast(builder.shl(biased, ir.Constant(integers, [23] * LANES)), _VECTOR)
    return builder.fmul(p, power)


def _write_dots(dtype: int, heads: int) -> Any:
    def write(builder: Any, row: Any, queries: Any, dim: Any, out: Any, stride: Any) -> None:
        def step(column: Any, sums: list[Any]) -> list[Any]:
            key = _elements(builder, builder.add(row, builder.mul(column, number(_SIZES[dtype]))), dtype)
            at = builder.add(queries, builder.mul(column, number(4)))
            found = []
            for head, total in enumerate(sums):
                offset = builder.mul(builder.mul(dim, number(4)), number(head))
                found.append(_fused(builder, key, load(builder, builder.add(at, offset), _VECTOR, 4), total))
            return found

        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        sums = loop(builder, number(0), dim, LANES, [zero] * heads, step)
        for head, total in enumerate(sums):
            place = builder.add(out, builder.mul(stride, number(4 * head)))
            builder.store(_summed(builder, total), builder.inttoptr(place, F32.as_pointer())).align = 4

    return write


def _write_values(dtype: int, heads: int, width: int) -> Any:
    """``width`` vectors of columns at a time, of columns ``first`` to ``end``."""

    def write(
        builder: Any, base: Any, starts: Any, count: Any, dim: Any, weights: Any, stride: Any, sums: Any, first: Any,
        end: Any,
    ) -> None:  # fmt: skip
        def place(head: int, column: Any, part: int) -> Any:
            offset = builder.add(builder.mul(dim, number(head)), builder.add(column, number(part * LANES)))
            return builder.add(sums, builder.mul(offset, number(4)))

        def columns(column: Any, _: list[Any]) -> list[Any]:
            held = [
                load(builder, place(head, column, part), _VECTOR, 4) for head in range(heads) for part in range(width)
            ]

            def row(line: Any, totals: list[Any]) -> list[Any]:
                start = load(builder, builder.add(starts, builder.mul(line, number(8))), I64, 8)
                element = builder.add(builder.add(start, dim), column)
                at = builder.add(base, builder.mul(element, number(_SIZES[dtype])))
                values = [
                    _elements(builder, builder.add(at, number(part * LANES * _SIZES[dtype])), dtype)
                    for part in range(width)
                ]
                found = []
                for head in range(heads):
                    offset = builder.add(builder.mul(stride, number(head)), line)
                    weight = load(builder, builder.add(weights, builder.mul(offset, number(4))), F32, 4)
                    wide = broadcast(builder, weight)
                    found += [_fused(builder, wide, values[part], totals[head * width + part]) for part in range(width)]
                return found

            totals = loop(builder, number(0), count, 1, held, row)
            for head in range(heads):
                for part in range(width):
                    pointer = builder.inttoptr(place(head, column, part), _VECTOR.as_pointer())
                    builder.store(totals[head * width + part], pointer).align = 4
            return []

        loop(builder, first, end, width * LANES, [], columns)

    return write


def _write_soften(builder: Any, scores: Any, log_pi: Any, count: Any, top: Any, total: Any) -> None:
    lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
    integers = ir.VectorType(I64, LANES)

    def inside(first: Any) -> Any:
        one = builder.insert_element(
            ir.Constant(integers, ir.Undefined), builder.sub(count, first), ir.Constant(I32, 0)
        )
        left = builder.shuffle_vector(
            one, ir.Constant(integers, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        )
        return builder.icmp_signed("<", lanes, left)

    def place(first: Any, base: Any) -> Any:
        return builder.add(base, builder.mul(first, number(4)))

    def lower(first: Any, tops: list[Any]) -> list[Any]:
        found = builder.fsub(
            load(builder, place(first, scores), _VECTOR, 4), load(builder, place(first, log_pi), _VECTOR, 4)
        )
        found = builder.select(inside(first), found, _same(float("-inf")))
        builder.store(found, builder.inttoptr(place(first, scores), _VECTOR.as_pointer())).align = 4
        return [_largest(builder, found, tops[0])]

    before = load(builder, top, F32, 4)
    (tops,) = loop(builder, number(0), count, LANES, [broadcast(builder, before)], lower)
    largest = call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", tops, result=F32)
    builder.store(largest, builder.inttoptr(top, F32.as_pointer())).align = 4
    nothing = builder.fcmp_ordered("==", largest, ir.Constant(F32, float("-inf")))
    shift = broadcast(builder, builder.select(nothing, ir.Constant(F32, 0.0), largest))

    def lift(first: Any, sums: list[Any]) -> list[Any]:
        raised = _exponential(builder, builder.fsub(load(builder, place(first, scores), _VECTOR, 4), shift))
        raised = builder.select(inside(first), raised, _same(0.0))
        builder.store(raised, builder.inttoptr(place(first, scores), _VECTOR.as_pointer())).align = 4
        return [builder.fadd(sums[0], raised)]

    (sums,) = loop(builder, number(0), count, LANES, [_same(0.0)], lift)
    builder.store(_summed(builder, sums), builder.inttoptr(total, F32.as_pointer())).align = 4


def _write_exponentials(builder: Any, numbers: Any, count: Any) -> None:
    def place(index: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(numbers, builder.mul(index, number(4))), kind.as_pointer())

    def whole(first: Any, _: list[Any]) -> list[Any]:
        at = place(first, _VECTOR)
        found = builder.load(at)
        found.align = 4
        builder.store(_exponential(builder, found), at).align = 4
        return []

    def single(index: Any, _: list[Any]) -> list[Any]:
        at = place(index, F32)
        raised = _exponential(builder, broadcast(builder, builder.load(at)))
        builder.store(builder.extract_element(raised, ir.Constant(I32, 0)), at)
        return []

    vectors = builder.and_(count, number(-LANES))
    loop(builder, number(0), vectors, LANES, [], whole)
    loop(builder, vectors, count, 1, [], single)


def _write_widen(dtype: int) -> Any:
    def write(builder: Any, source: Any, count: Any, scale: Any, out: Any) -> None:
        factor = broadcast(builder, builder.bitcast(builder.trunc(scale, I32), F32))

        def step(first: Any, _: list[Any]) -> list[Any]:
            found = _elements(builder, builder.add(source, builder.mul(first, number(_SIZES[dtype]))), dtype)
            pointer = builder.inttoptr(builder.add(out, builder.mul(first, number(4))), _VECTOR.as_pointer())
            builder.store(builder.fmul(found, factor), pointer).align = 4
            return []

        loop(builder, number(0), count, LANES, [], step)

    return write


def _by_dtype(builder: Any, dtype: Any, emit: Any) -> None:
    """``emit`` the code of each element type, and run that of ``dtype``."""
    after = builder.append_basic_block("after")
    switch = builder.switch(dtype, after)
    for kind in _NAMES:
        block = builder.append_basic_block(_NAMES[kind])
        switch.add_case(number(kind), block)
        builder.position_at_end(block)
        emit(kind)
        builder.branch(after)
    builder.position_at_end(after)


@intrinsic
def dots(typingctx: Any, row: Any, dtype: Any, queries: Any, heads: Any, dim: Any, out: Any, stride: Any) -> Any:
    """Dot products of a stored row's first ``dim`` elements with ``heads`` queries.

    Args:
        row: its address. dtype: code of its elements (index/rows.py). queries: address of (heads, dim) float32.
        out: address of float32, one every ``stride``.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, dtype, queries, heads, dim, out, stride = args

        def emit(kind: int) -> None:
            four, one = (
                function(builder.module, f"retrieval_dots_{_NAMES[kind]}_{n}", 5, _write_dots(kind, n)) for n in (4, 1)
            )

            def ask(code: Any, head: Any) -> list[Any]:
                asked = builder.add(queries, builder.mul(builder.mul(head, dim), number(4)))
                place = builder.add(out, builder.mul(builder.mul(head, stride), number(4)))
                builder.call(code, [row, asked, dim, place, stride])
                return []

            fours = builder.and_(heads, number(-4))
            loop(builder, number(0), fours, 4, [], lambda head, _: ask(four, head))
            loop(builder, fours, heads, 1, [], lambda head, _: ask(one, head))

        _by_dtype(builder, dtype, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def add_values(
    typingctx: Any, base: Any, dtype: Any, starts: Any, count: Any, dim: Any, weights: Any, stride: Any, heads: Any,
    sums: Any,
) -> Any:  # fmt: skip
    """Add ``count`` rows' values, elements ``dim`` to 2 * dim, times their weights to the sums of ``heads`` heads.

    Args:
        base: address of element 0. starts: address of int64, element where each row begins. weights: address of (heads,
            stride) float32, one a row. sums: address of (heads, dim) float32.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, dtype, starts, count, dim, weights, stride, heads, sums = args

        def emit(kind: int) -> None:
            def add(head: Any, some: int) -> list[Any]:
                wide, narrow = (
                    function(
                        builder.module, f"retrieval_values_{_NAMES[kind]}_{some}_{width}", 9,
                        _write_values(kind, some, width),
                    )
                    for width in (2, 1)
                )  # fmt: skip
                mine = builder.add(weights, builder.mul(builder.mul(head, stride), number(4)))
                place = builder.add(sums, builder.mul(builder.mul(head, dim), number(4)))
                pairs = builder.and_(dim, number(-2 * LANES))
                builder.call(wide, [base, starts, count, dim, mine, stride, place, number(0), pairs])
                builder.call(narrow, [base, starts, count, dim, mine, stride, place, pairs, dim])
                return []

            fours = builder.and_(heads, number(-4))
            loop(builder, number(0), fours, 4, [], lambda head, _: add(head, 4))
            loop(builder, fours, heads, 1, [], lambda head, _: add(head, 1))

        _by_dtype(builder, dtype, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def soften(typingctx: Any, scores: Any, log_pi: Any, count: Any, top: Any, total: Any) -> Any:
    """Scores of one head less log pi, as exponentials relative to their maximum.

    Args:
        scores: address of float32, replaced; there is room for a multiple of 16. log_pi: address of as many.
        top: address of a float32 that the maximum is not less than, replaced by it. total: address where the sum goes.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(function(builder.module, "retrieval_soften", 5, _write_soften), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def exponentials(typingctx: Any, numbers: Any, count: Any) -> Any:
    """exp(x) of ``count`` float32 numbers x <= 0 at the address ``numbers``, in their place; relative error below 3e-7,
    and below exp(-87) it stays there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(function(builder.module, "retrieval_exponentials", 2, _write_exponentials), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def widen(typingctx: Any, source: Any, dtype: Any, count: Any, scale: Any, out: Any) -> Any:
    """Stored elements, a multiple of 16, as float32 times ``scale``, a float32. ``out``: address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, dtype, count, scale, out = args

        def emit(kind: int) -> None:
            code = function(builder.module, f"retrieval_widen_{_NAMES[kind]}", 4, _write_widen(kind))
            builder.call(code, [source, count, bits, out])

        bits = builder.zext(builder.bitcast(scale, I32), I64)
        _by_dtype(builder, dtype, emit)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64), codegen
