# SPDX-License-Identifier: Apache-2.0
"""All codes of a shard against the queries of a group, for processors with AVX-512 VNNI.

What Faiss's range search does (index/native.py), over the same bytes, in much less time. Faiss looks up every
dimension of every key in tables; the levels are uniform here, so a score is an inner product of small integers, which
``vpdpbusd`` adds up four dimensions at a time. And it is fetched ahead what comes next: codes of all layers are more
than a cache holds, and Faiss waits for them. `bench.search --scan` compares them (docs/benchmarks.md, 2026-11-27).

Queries are rounded to 8 bits, 127 for a query's largest coordinate. Sums are exact.
"""

from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import codegen, config
from numba.extending import intrinsic

from vllm_retrieval_attn.index.llvm import I8, I16, I32, I64, broadcast, call, fetch, function, load, loop, number
from vllm_retrieval_attn.index.native import best_of
from vllm_retrieval_attn.index.packing import ORDER, STEP
from vllm_retrieval_attn.index.rows import jit

_FEATURES = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
CAN_SCAN = all(f"+{name}" in _FEATURES.split(",") for name in ("avx512f", "avx512bw", "avx512vnni"))
"""Whether this processor can do it, and Numba is let use it (``NUMBA_CPU_FEATURES``, ``NUMBA_ENABLE_AVX``)."""
HEADS = 4
"""Queries that are scored at a time: as many as share the codes in registers."""
LANES = 16
_AHEAD = 4096
"""Bytes of codes fetched ahead, two blocks of 128 dimensions."""
_MOST_SUM = 1 << 30
"""No sum of products comes near: 256 dimensions of 15 times 127 are half a million."""
_BYTES, _SUMS = ir.VectorType(I8, 64), ir.VectorType(I32, LANES)

llvm.initialize_native_asmparser()  # for the one instruction below; LLVM changes its own name for it now and then


def _write_scan(heads: int) -> Any:
    """The loop for ``heads`` queries."""

    def write(
        builder: Any, codes: Any, blocks: Any, dim: Any, queries: Any, floors: Any, out: Any, room: Any, counts: Any
    ) -> None:
        steps = builder.lshr(dim, number(2))
        stride = builder.mul(builder.add(dim, number(2)), number(16))
        product = ir.InlineAsm(ir.FunctionType(_SUMS, [_SUMS] * 3), "vpdpbusd $3, $2, $0", "=v,0,v,v")
        # 64 bytes hold four dimensions, 16 bytes each: to four dimensions of each key.
        by_key = ir.Constant(ir.VectorType(I32, 64), [16 * (place % 4) + place // 4 for place in range(64)])
        nothing, undefined = ir.Constant(_SUMS, [0] * LANES), ir.Constant(_BYTES, ir.Undefined)
        least = [broadcast(builder, load(builder, builder.add(floors, number(4 * h)), I32, 4)) for h in range(heads)]

        def add(base: Any, step: Any, sums: list[Any]) -> list[Any]:
            at = builder.add(base, builder.mul(step, number(64)))
            fetch(builder, builder.inttoptr(builder.add(at, number(_AHEAD)), I8.as_pointer()))
            mixed = builder.shuffle_vector(load(builder, at, _BYTES, 1), undefined, by_key)
            halves = (
                builder.bitcast(builder.and_(mixed, ir.Constant(_BYTES, [15] * 64)), _SUMS),
                builder.bitcast(builder.lshr(mixed, ir.Constant(_BYTES, [4] * 64)), _SUMS),
            )
            found = []
            for h in range(heads):
                place = builder.add(builder.mul(steps, number(h)), step)
                asked = load(builder, builder.add(queries, builder.mul(place, number(4))), I32, 4)
                wide = broadcast(builder, asked)
                found += [builder.call(product, [sums[2 * h + i], half, wide]) for i, half in enumerate(halves)]
            return found

        def block(index: Any, held: list[Any]) -> list[Any]:
            base = builder.add(codes, builder.mul(index, stride))
            sums = loop(
                builder, number(0), steps, 1, [nothing] * (2 * heads), lambda step, found: add(base, step, found)
            )
            first = broadcast(builder, builder.trunc(builder.mul(index, number(32)), I32))
            counted = []
            for h, count in enumerate(held):
                for half in range(2):
                    keys = builder.add(first, ir.Constant(_SUMS, [key + 16 * half for key in ORDER]))
                    reached = builder.icmp_signed(">=", sums[2 * h + half], least[h])
                    for line, values in enumerate((keys, sums[2 * h + half])):
                        kept = call(
                            builder, "llvm.x86.avx512.mask.compress.v16i32", values, nothing, reached, result=_SUMS
                        )
                        place = builder.add(builder.mul(room, number(2 * h + line)), count)
                        address = builder.add(out, builder.mul(place, number(4)))
                        builder.store(kept, builder.inttoptr(address, _SUMS.as_pointer())).align = 4
                    ones = call(builder, "llvm.ctpop.i16", builder.bitcast(reached, I16), result=I16)
                    count = builder.add(count, builder.zext(ones, I64))
                counted.append(count)
            return counted

        for h, count in enumerate(loop(builder, number(0), blocks, 1, [number(0)] * heads, block)):
            builder.store(count, builder.inttoptr(builder.add(counts, number(8 * h)), I64.as_pointer()))

    return write


@intrinsic
def _scan(
    typingctx: Any, codes: Any, blocks: Any, dim: Any, queries: Any, floors: Any, out: Any, room: Any, counts: Any,
    heads: Any,
) -> Any:  # fmt: skip
    """Keys whose sums reach the floors of ``heads`` queries, at most HEADS.

    Args:
        codes: address of blocks of 32 keys (index/packing.py). queries: address of (heads, dim) int8. floors: address
            of (heads,) int32. out: address of (heads, 2, room) int32, written: keys, in the order of their codes, and
            sums. counts: address of (heads,) int64, written: how many. ``room`` is LANES more than there are keys.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        after = builder.append_basic_block("after")
        switch = builder.switch(args[-1], after)
        for heads in range(1, HEADS + 1):
            case = builder.append_basic_block(f"heads_{heads}")
            switch.add_case(number(heads), case)
            builder.position_at_end(case)
            builder.call(function(builder.module, f"retrieval_scan_{heads}", 8, _write_scan(heads)), args[:-1])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


class ScanScratch(NamedTuple):
    """Memory of one thread.

    Attributes:
        query: (HEADS, d) int8. unit, centre: (HEADS,) float64, what a sum is to be multiplied by, less the second.
        floor: (HEADS,) int32. found: (HEADS, 2, keys + LANES) int32 keys and sums. counts: (HEADS,) int64, how many.
    """

    query: npt.NDArray[np.int8]
    unit: npt.NDArray[np.float64]
    centre: npt.NDArray[np.float64]
    floor: npt.NDArray[np.int32]
    found: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]


def scan_scratch(dim: int, keys: int) -> ScanScratch:
    """Memory for shards of up to ``keys`` keys; what is not used is not touched."""
    return ScanScratch(
        np.zeros((HEADS, dim), np.int8), np.zeros(HEADS), np.zeros(HEADS), np.zeros(HEADS, np.int32),
        np.zeros((HEADS, 2, keys + LANES), np.int32), np.zeros(HEADS, np.int64),
    )  # fmt: skip


@jit
def _rounded(scaled: Any, query: Any) -> Any:
    """Round a query, the first d of ``scaled`` (d + 1,), into ``query`` (d,) int8; returns its unit, its centre
    (ScanScratch), and the sum that reaches a score of 0."""
    dim = len(query)
    largest = np.float32(0.0)
    for j in range(dim):
        largest = max(largest, abs(scaled[j]))
    unit = np.float64(max(largest, np.float32(1e-30))) / 127
    total = 0
    for j in range(dim):
        query[j] = np.int8(np.rint(scaled[j] / unit))
        total += query[j]
    least = np.ceil(7.5 * total - scaled[dim] / (unit * STEP))
    return unit * STEP, 7.5 * total, np.int32(min(max(least, -_MOST_SUM), _MOST_SUM))


@jit
def _keep_best(found: Any, sums: Any, count: int, most: int) -> int:
    """Leave the ``most`` best of ``count`` keys and their sums, in their order; of those that are alike the first."""
    least, ties = best_of(sums[:count], most)
    at = 0
    for c in range(count):
        if sums[c] == least:
            ties -= 1
        if sums[c] > least or (sums[c] == least and ties >= 0):
            found[at], sums[at] = found[c], sums[c]
            at += 1
    return at


def _scan_above(codes: int, keys: int, queries: Any, most: int, work: Any, scores: Any, ids: Any, starts: Any) -> None:
    """All keys that score 0 and more for each query; the best ``most`` where there are more.

    Args:
        codes: address of ``keys`` keys' codes, a multiple of 32. queries: (n, d + 1) float32, contiguous; the last
            coordinate is added to every score. work: ScanScratch.
        scores, ids: (n * most,) float32 and int32, written. starts: (n + 1,) int64, written: where each query's begin.
    """
    heads, dim = queries.shape[0], queries.shape[1] - 1
    at = 0
    for first in range(0, heads, HEADS):
        some = min(HEADS, heads - first)
        for h in range(some):
            unit, centre, least = _rounded(queries[first + h], work.query[h])
            work.unit[h], work.centre[h], work.floor[h] = unit, centre, least
        _scan(
            codes, keys // 32, dim, work.query.ctypes.data, work.floor.ctypes.data, work.found.ctypes.data,
            work.found.shape[2], work.counts.ctypes.data, some,
        )  # fmt: skip
        for h in range(some):
            starts[first + h] = at
            count, found, sums = work.counts[h], work.found[h, 0], work.found[h, 1]
            unit = np.float32(work.unit[h])
            rest = np.float32(queries[first + h, dim] - work.centre[h] * work.unit[h])
            if count > most:
                count = _keep_best(found, sums, count, most)
            for c in range(count):
                scores[at + c] = np.float32(sums[c]) * unit + rest
                ids[at + c] = found[c]
            at += count
    starts[heads] = at


def _can_not(codes: int, keys: int, queries: Any, most: int, work: Any, scores: Any, ids: Any, starts: Any) -> None:
    raise RuntimeError("retrieval: this processor has no AVX-512 VNNI")


scan_above = jit(_scan_above if CAN_SCAN else _can_not)
