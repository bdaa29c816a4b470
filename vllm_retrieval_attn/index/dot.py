"""Inner products of 4-bit codes with an int8 query, callable from Numba code.

Two layouts. A *block* holds 16 rows; its byte ``64 * v + 4 * row + i`` carries dimension ``8 * v + i`` in the low
nibble and ``8 * v + 4 + i`` in the high one (i = 0..3), so that a 64-byte load feeds ``vpdpbusd`` of AVX-512 VNNI
twice and the 16 sums need no shuffle. A *row* stands alone: chunks of W bytes, each with W dimensions in the low
nibbles and the next W in the high ones, W as :func:`row_width` says. Processors without VNNI run plain vector code
with the same results, bit for bit.
"""

from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 16
"""Keys of a block."""

HAS_VNNI = bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni", False))

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


_WIDE = ir.VectorType(_I32, BLOCK)


def _splat(builder: Any, word: Any) -> Any:
    undefined = ir.Constant(_WIDE, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WIDE, [ir.Constant(_I32, 0)] * BLOCK))


def _constant(value: int) -> Any:
    return ir.Constant(_WIDE, [ir.Constant(_I32, value)] * BLOCK)


def _with_vnni(builder: Any, packed: Any, query: Any, first: Any, total: Any) -> Any:
    """``vpdpbusd`` multiplies four unsigned bytes by four signed ones in each of 16 words, and adds them up."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    kind = ir.FunctionType(_WIDE, [_WIDE, _WIDE, _WIDE])
    dot = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    words = builder.inttoptr(builder.add(query, first), _I32.as_pointer())
    low = builder.and_(packed, _constant(0x0F0F0F0F))
    high = builder.and_(builder.lshr(packed, _constant(4)), _constant(0x0F0F0F0F))
    total = builder.call(dot, [total, low, _splat(builder, builder.load(words, align=1))])
    next_word = builder.gep(words, [ir.Constant(_I64, 1)])
    return builder.call(dot, [total, high, _splat(builder, builder.load(next_word, align=1))])


def _with_plain_vectors(builder: Any, packed: Any, query: Any, first: Any, total: Any) -> Any:
    weights = builder.inttoptr(builder.add(query, first), _I8.as_pointer())
    for nibble in range(8):  # of a word: low and high nibble of each of its bytes
        dimension = nibble // 2 + 4 * (nibble % 2)
        weight = builder.sext(builder.load(builder.gep(weights, [ir.Constant(_I64, dimension)])), _I32)
        code = builder.and_(builder.lshr(packed, _constant(4 * nibble)), _constant(15))
        total = builder.add(total, builder.mul(code, _splat(builder, weight)))
    return total


def _make(step: Any) -> Any:
    def dot_block(typingctx: Any, codes: Any, query: Any, vectors: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, query, vectors, out = args
            total = cgutils.alloca_once(builder, _WIDE)
            builder.store(ir.Constant(_WIDE, None), total)
            blocks = builder.inttoptr(source, _WIDE.as_pointer())
            with cgutils.for_range(builder, vectors) as loop:
                packed = builder.load(builder.gep(blocks, [loop.index]), align=16)
                first = builder.mul(loop.index, ir.Constant(_I64, 8))
                builder.store(step(builder, packed, query, first, builder.load(total)), total)
            builder.store(builder.load(total), builder.inttoptr(out, _WIDE.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return intrinsic(dot_block)


def row_width(dim: int) -> int:
    """Bytes of a chunk of a row of ``dim`` dimensions: as wide as divides it evenly."""
    return next(width for width in (64, 32, 16) if dim % (2 * width) == 0 or width == 16)


def row_bytes(dim: int) -> int:
    """Bytes of a row; dimensions beyond ``dim`` are zero in the query."""
    width = row_width(dim)
    return -(-dim // (2 * width)) * width


def _row_step(builder: Any, width: int, packed: Any, weights: Any, total: Any, vnni: bool) -> Any:
    lanes = width // 4
    wide = ir.VectorType(_I32, lanes)

    def constant(value: int) -> Any:
        return ir.Constant(wide, [ir.Constant(_I32, value)] * lanes)

    low, high = (
        builder.and_(packed, constant(0x0F0F0F0F)),
        builder.and_(builder.lshr(packed, constant(4)), constant(0x0F0F0F0F)),
    )
    halves = builder.bitcast(weights, wide.as_pointer())
    first = builder.load(halves, align=1)
    second = builder.load(builder.gep(halves, [ir.Constant(_I64, 1)]), align=1)
    if vnni:
        name = f"llvm.x86.avx512.vpdpbusd.{width * 8}"
        dot = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(wide, [wide] * 3), name)
        return builder.call(dot, [builder.call(dot, [total, low, first]), high, second])
    for codes, query in ((low, first), (high, second)):
        for byte in range(4):
            code = builder.and_(builder.lshr(codes, constant(8 * byte)), constant(15))
            weight = builder.ashr(builder.shl(query, constant(24 - 8 * byte)), constant(24))
            total = builder.add(total, builder.mul(code, weight))
    return total


def _make_row(width: int, vnni: bool) -> Any:
    def dot_row(typingctx: Any, codes: Any, query: Any, chunks: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, query, chunks = args
            lanes = width // 4
            wide = ir.VectorType(_I32, lanes)
            total = cgutils.alloca_once(builder, wide)
            builder.store(ir.Constant(wide, None), total)
            rows = builder.inttoptr(codes, wide.as_pointer())
            weights = builder.inttoptr(query, _I8.as_pointer())
            with cgutils.for_range(builder, chunks) as loop:
                packed = builder.load(builder.gep(rows, [loop.index]), align=16)
                at = builder.gep(weights, [builder.mul(loop.index, ir.Constant(_I64, 2 * width))])
                builder.store(_row_step(builder, width, packed, at, builder.load(total), vnni), total)
            name = f"llvm.vector.reduce.add.v{lanes}i32"
            add = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(_I32, [wide]), name)
            return builder.call(add, [builder.load(total)])

        return types.int32(types.int64, types.int64, types.int64), codegen

    return intrinsic(dot_row)


_row64, _row32, _row16 = (_make_row(width, HAS_VNNI) for width in (64, 32, 16))
_row64_plain, _row32_plain, _row16_plain = (_make_row(width, False) for width in (64, 32, 16))


@numba.njit(inline="always")
def dot_row(codes: int, query: int, width: int, size: int) -> int:
    """Sum over dimensions of code * query for one row.

    Args:
        codes, query: addresses of the row (``size`` bytes, 16-byte aligned) and of the query (int8, ``2 * size``
            dimensions). width, size: :func:`row_width` and :func:`row_bytes`.
    """
    if width == 64:
        return _row64(codes, query, size // 64)
    if width == 32:
        return _row32(codes, query, size // 32)
    return _row16(codes, query, size // 16)


@numba.njit(inline="always")
def dot_row_plain(codes: int, query: int, width: int, size: int) -> int:
    """:func:`dot_row` without VNNI."""
    if width == 64:
        return _row64_plain(codes, query, size // 64)
    if width == 32:
        return _row32_plain(codes, query, size // 32)
    return _row16_plain(codes, query, size // 16)


dot_block_plain = _make(_with_plain_vectors)
dot_block = _make(_with_vnni) if HAS_VNNI else dot_block_plain
"""``dot_block(codes, query, vectors, out)``: sums over dimensions of code * query for the 16 keys of a block.

Args (all int64): addresses of the block's codes (``64 * vectors`` bytes, 16-byte aligned) and of the query (int8,
``8 * vectors`` dimensions, in order), the number of 8-dimension vectors, and the address of 16 int32 results.
"""
