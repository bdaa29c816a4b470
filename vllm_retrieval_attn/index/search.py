"""Attention over indexed segments, coarse to fine: nodes, leaves, codes, exact re-rank, and an estimate of the rest.

One call serves the ``g`` query heads that share a KV head over a run of nodes that may span many segments. What one
query reads all of them use: nodes, leaves and keys are chosen by the largest of the heads' estimated weights, so
memory is read once for all.

1. Score the centroids of all nodes; keep those of largest weight.
2. Score the leaves of those; keep those of largest weight, up to the budget.
3. Score the 4-bit codes of the keys in those; the ``rerank`` keys of largest weight are attended to exactly.
4. Tail: what was scored and not re-ranked counts with its estimated weight and the mean value of its neighbours
   (index-study: removes most of the error that top-k attention leaves). RetroInfer (arXiv 2505.02922) calls
   the same for unread clusters its estimation zone.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.dot import dot_block, dot_row, row_bytes, row_width
from vllm_retrieval_attn.index.kernels import TILE, attend_picked, jit
from vllm_retrieval_attn.index.segment import (
    GROUP,
    HEAD_SHARE,
    HEAD_TURN,
    LEAF,
    LEAVES,
    NODE,
    STEP4,
    SegmentShape,
)

MAX_NODES = 512
"""Nodes of one call, 128K keys: bounds the scratch memory. Longer runs are served in several calls."""

NODE_REACH = 16.0
"""Nodes are kept until they hold this many times the keys that may be scanned."""

BINS = 1024
_BIN_SCALE = 32.0
"""Histogram of log weights: 1,024 bins of 1/32, down from the largest."""

(
    AT_HEAD,
    AT_MEAN,
    AT_NODE_STEP,
    AT_NODE_SPREAD,
    AT_LEAF_STEP,
    AT_KEY_STEP,
    AT_ENDS,
    AT_NODE_CODES,
    AT_LEAF_CODES,
    AT_KEY_CODES,
    AT_ORDER,
    AT_VALUE_STEP,
    AT_VALUES,
) = range(13)

_NEGLIGIBLE = np.float32(1e-5)
"""Groups whose estimated share of the total is smaller do not get their mean value read."""

_GROUPS = LEAVES // GROUP  # of a node
_SPREAD = np.float32(1.0 / (STEP4 * STEP4))  # from the square of a step to the mean square of what was coded

COUNT_NODES, COUNT_LEAVES, COUNT_KEYS, COUNT_EXACT, COUNT_VALUES = range(5)
"""What a call touched: nodes, leaves and codes scored, keys read exactly, mean values read."""


def offsets_of(shape: SegmentShape) -> npt.NDArray[np.int64]:
    """The parts of a slab as :func:`attend_nodes` wants them."""
    return np.array(list(shape.offsets.values())[:13], np.int64)


@jit
def turn_query(
    mem16: Any, first: int, q: Any, turned: Any, codes: Any, steps: Any, sums: Any, squares: Any
) -> None:  # fmt: skip
    """Queries in the balanced space, as int8 with a step each.

    Args:
        mem16: memory with the transform, (d, d) bfloat16 from element ``first``. q: (g, d), scaled.
        turned: (g, d) float32 scratch. codes: (g, >= d) int8, written. steps, sums: (g,) float32 step and sum of
        the codes. squares: (g,) float32 squared norm.
    """
    g, dim = q.shape
    bits = np.empty(dim, np.uint32)
    row = bits.view(np.float32)
    for r in range(dim):
        half = mem16[first + r * dim : first + (r + 1) * dim]
        for j in range(dim):
            bits[j] = np.uint32(half[j]) << np.uint32(16)
        for i in range(g):
            qi = q[i]
            total = np.float32(0.0)
            for j in range(dim):
                total += row[j] * qi[j]
            turned[i, r] = total
    for i in range(g):
        top = np.float32(1e-20)
        square = np.float32(0.0)
        for r in range(dim):
            top = max(top, abs(turned[i, r]))
            square += turned[i, r] * turned[i, r]
        step = top / np.float32(127.0)
        steps[i] = step
        squares[i] = square
        total_code = 0
        for r in range(dim):
            code = np.int32(np.rint(turned[i, r] / step))
            codes[i, r] = code
            total_code += int(code)
        sums[i] = total_code


@jit
def cut_weight(weights: Any, sizes: Any, n: int, keep: int, bins: Any) -> tuple[float, float, int]:
    """Where to cut ``weights[:n]`` so that the largest, with ``sizes`` of about ``keep`` together, remain.

    Returns:
        Two thresholds and a count: what lies at or above the first is kept; of what lies between the second and the
        first, sizes of ``count`` together (weights may tie, in heads that attend evenly). All -inf if everything fits.
    """
    for b in range(BINS):
        bins[b] = 0
    top = np.float32(-1e30)
    for i in range(n):
        top = max(top, weights[i])
    for i in range(n):
        b = int(min(top - weights[i], np.float32(100.0)) * np.float32(_BIN_SCALE))
        bins[min(max(b, 0), BINS - 1)] += sizes[i]
    count = 0
    for b in range(BINS):
        if count + bins[b] > keep:
            upper = float(top) - b / _BIN_SCALE if b > 0 else np.inf
            lower = float(top) - (b + 1) / _BIN_SCALE if b < BINS - 1 else -np.inf
            return upper, lower, keep - count
        count += bins[b]
    return -np.inf, -np.inf, 0


@jit
def attend_nodes(
    mem_i8: Any,
    mem16: Any,
    mem_f32: Any,
    mem_f64: Any,
    address: int,
    slabs: Any,
    at: Any,
    nodes_per_segment: int,
    node_begin: int,
    node_end: int,
    rows16: Any,
    rows32: Any,
    dtype: int,
    table: Any,
    page_tokens: int,
    page_stride: int,
    row_base: int,
    value_delta: int,
    q: Any,
    budget: float,
    rerank: int,
    tail: int,
    acc: Any,
    top: Any,
    total: Any,
    tile: Any,
    tile_bits: Any,
    scores: Any,
    exp_bits: Any,
    exp_scale: Any,
    row_chunk: int,
    row_size: int,
    turned: Any,
    q8: Any,
    steps: Any,
    sums: Any,
    squares: Any,
    scales: Any,
    offsets: Any,
    dots: Any,
    node_scores: Any,
    node_bonus: Any,
    node_weight: Any,
    node_size: Any,
    node_kept: Any,
    leaf_scores: Any,
    leaf_weight: Any,
    leaf_size: Any,
    leaf_ids: Any,
    key_scores: Any,
    key_weight: Any,
    ones: Any,
    group_weight: Any,
    base: Any,
    means: Any,
    picked: Any,
    bins: Any,
    counts: Any,
    chosen: Any,
) -> None:
    """Fold nodes ``[node_begin, node_end)`` of a request's indexed segments into the running softmax of ``g`` queries.

    Args:
        mem_i8 .. mem_f64: views of the memory that holds the slabs, ``address`` its address.
        slabs: byte offset of the slab of each segment. at: see :func:`offsets_of`.
        rows16, rows32, dtype: the memory that holds K and V rows (index/kernels.py). The row of host token t starts at
            element ``table[t // page_tokens] * page_stride + row_base + (t % page_tokens) * d``, its value
            ``value_delta`` elements later.
        q: (g, d) float32 queries, multiplied by the softmax scale.
        budget: share of keys whose codes are scored, 0: as calibrated. rerank: keys attended to exactly.
        tail: 1 to estimate the rest.
        acc, top, total: running softmax, see attend_rows. The others are scratch, see :class:`Scratch`.
        counts: (5,) int64, added to. chosen: int64, empty or filled with the tokens attended to exactly.
    """
    g, dim = q.shape
    vectors = dim // 8
    block = 64 * vectors
    nodes = node_end - node_begin
    out = dots.ctypes.data
    query_bytes = q8.shape[1]
    # 1. nodes
    allowed = 0.0
    turn = np.float64(-1.0)  # whose transform the queries are in; kept through the steps below
    segment = -1
    for i in range(nodes):
        number = node_begin + i
        if number // nodes_per_segment != segment:
            segment = number // nodes_per_segment
            slab = slabs[segment]
            head = (slab + at[AT_HEAD]) // 8
            if mem_f64[head + HEAD_TURN] != turn:
                turn = mem_f64[head + HEAD_TURN]
                turn_query(mem16, int(turn), q, turned, q8, steps, sums, squares)
            mean = mem_f32[(slab + at[AT_MEAN]) // 4 : (slab + at[AT_MEAN]) // 4 + dim]
            for h in range(g):
                dot = np.float32(0.0)
                for j in range(dim):
                    dot += q[h, j] * mean[j]
                means[h] = dot
            share = mem_f64[head + HEAD_SHARE]
            planes = address + slab + at[AT_NODE_CODES]
            second_plane = (nodes_per_segment + 15) // 16 * block
            ends = (slab + at[AT_ENDS]) // 2
            scored = -1
        local = number - segment * nodes_per_segment
        if local // 16 != scored:
            scored = local // 16
            for h in range(g):
                query = q8.ctypes.data + h * query_bytes
                dot_block(planes + scored * block, query, vectors, out + h * 128)
                dot_block(planes + second_plane + scored * block, query, vectors, out + h * 128 + 64)
        step = mem_f32[(slab + at[AT_NODE_STEP]) // 4 + local]
        spread = np.float32(0.5) * mem_f32[(slab + at[AT_NODE_SPREAD]) // 4 + local]
        before = np.int32(mem16[ends + local * LEAVES - 1]) if local > 0 else np.int32(0)
        size = np.int32(mem16[ends + local * LEAVES + LEAVES - 1]) - before
        node_size[i] = size
        best = np.float32(-1e30)
        for h in range(g):
            code = np.float32(16 * dots[h, local % 16] + dots[h, 16 + local % 16]) - np.float32(127.5) * sums[h]
            score = means[h] + steps[h] * step * code
            node_scores[h, i] = score
            node_bonus[h, i] = squares[h] * spread
        allowed += (share if budget <= 0 else budget) * size
    counts[COUNT_NODES] += nodes
    for h in range(g):
        best = np.float32(-1e30)
        for i in range(nodes):
            if node_size[i] > 0:
                best = max(best, node_scores[h, i])
        weight = np.float32(1e-30)
        for i in range(nodes):
            weight += np.exp(min(node_scores[h, i] - best, np.float32(0.0))) * np.float32(node_size[i])
        base[h] = best + np.log(weight)
    keys_held = 0
    for i in range(nodes):
        weight = np.float32(-1e30)
        for h in range(g):
            weight = max(weight, node_scores[h, i] + node_bonus[h, i] - base[h])
        node_weight[i] = weight
        keys_held += node_size[i]
    keys_allowed = max(LEAF, min(int(allowed + 0.5), keys_held))
    reach = min(keys_held, max(int(keys_allowed * np.float32(NODE_REACH)), 2 * NODE))
    upper, lower, ties = cut_weight(node_weight, node_size, nodes, reach, bins)
    for i in range(nodes):
        node_kept[i] = node_weight[i] >= upper
        if node_weight[i] < upper and node_weight[i] > lower and ties > 0:
            ties -= node_size[i]
            node_kept[i] = True
    # 2. leaves of the nodes kept
    found = 0
    segment = -1
    for i in range(nodes):
        if not node_kept[i]:
            continue
        number = node_begin + i
        if number // nodes_per_segment != segment:
            segment = number // nodes_per_segment
            slab = slabs[segment]
            head = (slab + at[AT_HEAD]) // 8
            ends = (slab + at[AT_ENDS]) // 2
            if mem_f64[head + HEAD_TURN] != turn:
                turn = mem_f64[head + HEAD_TURN]
                turn_query(mem16, int(turn), q, turned, q8, steps, sums, squares)
        local = number - segment * nodes_per_segment
        source = address + slab + at[AT_LEAF_CODES] + local * block
        leaf_step = (slab + at[AT_LEAF_STEP]) // 4 + local * LEAVES
        key_step = (slab + at[AT_KEY_STEP]) // 4 + local * LEAVES
        end = np.int32(mem16[ends + local * LEAVES - 1]) if local > 0 else np.int32(0)
        for leaf in range(LEAVES):
            begin = end
            end = np.int32(mem16[ends + local * LEAVES + leaf])
            leaf_size[found + leaf] = end - begin
            leaf_weight[found + leaf] = -1e30
            leaf_ids[found + leaf] = i * LEAVES + leaf
        for h in range(g):
            dot_block(source, q8.ctypes.data + h * query_bytes, vectors, out)
            offset = np.float32(7.5) * sums[h]
            for leaf in range(LEAVES):
                score = node_scores[h, i] + steps[h] * mem_f32[leaf_step + leaf] * (np.float32(dots[0, leaf]) - offset)
                leaf_scores[h, found + leaf] = score
                step = mem_f32[key_step + leaf]
                bonus = np.float32(0.5) * squares[h] * step * step * _SPREAD
                leaf_weight[found + leaf] = max(leaf_weight[found + leaf], score + bonus - base[h])
        found += LEAVES
    counts[COUNT_LEAVES] += found
    upper, lower, ties = cut_weight(leaf_weight, leaf_size, found, keys_allowed, bins)
    # 3. keys of the leaves kept; leaf_ids is compacted to them, the others go to the tail
    groups = nodes * _GROUPS
    if tail:
        for h in range(g):
            for group in range(groups):
                group_weight[h, group] = 0.0
        for i in range(nodes):
            if not node_kept[i]:
                for h in range(g):
                    weight = np.exp(node_scores[h, i] - base[h]) * np.float32(node_size[i]) / np.float32(_GROUPS)
                    for part in range(_GROUPS):
                        group_weight[h, i * _GROUPS + part] = weight
    kept = 0
    keys = 0
    segment = -1
    for leaf in range(found):
        where = leaf_ids[leaf]
        size = leaf_size[leaf]
        if size == 0:
            continue
        if leaf_weight[leaf] < upper and leaf_weight[leaf] > lower and ties > 0:
            ties -= size
        elif leaf_weight[leaf] < upper:
            if tail:
                for h in range(g):
                    weight = np.exp(leaf_scores[h, leaf] - base[h]) * np.float32(size)
                    group_weight[h, where // GROUP] += weight
            continue
        number = node_begin + where // LEAVES
        if number // nodes_per_segment != segment:
            segment = number // nodes_per_segment
            slab = slabs[segment]
            head = (slab + at[AT_HEAD]) // 8
            ends = (slab + at[AT_ENDS]) // 2
            if mem_f64[head + HEAD_TURN] != turn:
                turn = mem_f64[head + HEAD_TURN]
                turn_query(mem16, int(turn), q, turned, q8, steps, sums, squares)
        local = (number - segment * nodes_per_segment) * LEAVES + where % LEAVES
        last = np.int64(mem16[ends + local])
        step = mem_f32[(slab + at[AT_KEY_STEP]) // 4 + local]
        for h in range(g):
            scale = steps[h] * step
            scales[h] = scale
            offsets[h] = leaf_scores[h, leaf] - scale * np.float32(7.5) * sums[h] - base[h]
        source = address + slab + at[AT_KEY_CODES] + (last - size) * row_size
        for _ in range(size):
            weight = np.float32(-1e30)
            for h in range(g):
                dot = dot_row(source, q8.ctypes.data + h * query_bytes, row_chunk, row_size)
                score = offsets[h] + scales[h] * np.float32(dot)
                key_scores[h, keys] = score
                weight = max(weight, score)
            key_weight[keys] = weight
            keys += 1
            source += row_size
        leaf_ids[kept] = where
        leaf_size[kept] = size
        kept += 1
    counts[COUNT_KEYS] += keys
    # 4. exact attention to the best, the rest to the tail
    upper, lower, ties = cut_weight(key_weight, ones, keys, rerank, bins)
    n = 0
    key = 0
    for leaf in range(kept):
        where = leaf_ids[leaf]
        number = node_begin + where // LEAVES
        segment = number // nodes_per_segment
        local = (number - segment * nodes_per_segment) * LEAVES + where % LEAVES
        begin = np.int64(mem16[(slabs[segment] + at[AT_ENDS]) // 2 + local]) - leaf_size[leaf]
        order = (slabs[segment] + at[AT_ORDER]) // 2 + begin
        for k in range(leaf_size[leaf]):
            if key_weight[key] < upper and key_weight[key] > lower and ties > 0:
                ties -= 1
            elif key_weight[key] < upper:
                if tail:
                    for h in range(g):
                        group_weight[h, where // GROUP] += np.exp(key_scores[h, key])
                key += 1
                continue
            key += 1
            token = segment * nodes_per_segment * NODE + np.int64(mem16[order + k])
            if len(chosen) > 0:
                chosen[counts[COUNT_EXACT] + n] = token
            picked[n] = table[token // page_tokens] * page_stride + row_base + token % page_tokens * dim
            n += 1
            if n == TILE:
                attend_picked(
                    rows16, rows32, dtype, picked, value_delta, n, q, acc, top, total, tile, tile_bits, scores,
                    exp_bits, exp_scale,
                )  # fmt: skip
                counts[COUNT_EXACT] += n
                n = 0
    if n > 0:
        attend_picked(
            rows16, rows32, dtype, picked, value_delta, n, q, acc, top, total, tile, tile_bits, scores, exp_bits,
            exp_scale,
        )  # fmt: skip
        counts[COUNT_EXACT] += n
    if not tail:
        return
    for h in range(g):
        if top[h] == -np.inf:
            top[h] = base[h]
        scales[h] = np.exp(base[h] - top[h])
        offsets[h] = _NEGLIGIBLE * (total[h] + scales[h])
    for group in range(groups):
        needed = False
        for h in range(g):
            needed = needed or group_weight[h, group] * scales[h] > offsets[h]
        if not needed:
            for h in range(g):
                total[h] += group_weight[h, group] * scales[h]
            continue
        counts[COUNT_VALUES] += 1
        number = node_begin + group // _GROUPS
        segment = number // nodes_per_segment
        local = (number - segment * nodes_per_segment) * _GROUPS + group % _GROUPS
        step = mem_f32[(slabs[segment] + at[AT_VALUE_STEP]) // 4 + local]
        first = slabs[segment] + at[AT_VALUES] + local * dim
        value = mem_i8[first : first + dim]
        for h in range(g):
            weight = group_weight[h, group] * scales[h]
            total[h] += weight
            weight *= step
            for j in range(dim):
                acc[h, j] += weight * np.float32(value[j])


class Scratch:
    """Working memory of one thread for :func:`attend_nodes`: ``arrays`` in its argument order after ``exp_scale``.

    Args:
        group: query heads that share a KV head. dim: head size. nodes: most nodes of a call.
    """

    def __init__(self, group: int, dim: int, nodes: int = MAX_NODES) -> None:
        f32 = np.float32
        keys, leaves = nodes * NODE + (2 << 16), nodes * LEAVES  # nodes at both ends may hold a whole segment
        self.arrays: tuple[Any, ...] = (
            row_width(dim),
            row_bytes(dim),
            np.empty((group, dim), f32),  # turned
            np.zeros((group, -(-2 * row_bytes(dim) // 64) * 64), np.int8),  # q8; dimensions beyond d stay zero
            np.empty(group, f32),  # steps
            np.empty(group, f32),  # sums
            np.empty(group, f32),  # squares
            np.empty(group, f32),  # scales
            np.empty(group, f32),  # offsets
            np.empty((group, 32), np.int32),  # dots
            np.empty((group, nodes), f32),
            np.empty((group, nodes), f32),
            np.empty(nodes, f32),
            np.empty(nodes, np.int32),
            np.empty(nodes, np.bool_),
            np.empty((group, leaves), f32),
            np.empty(leaves, f32),
            np.empty(leaves, np.int32),
            np.empty(leaves, np.int64),
            np.empty((group, keys), f32),
            np.empty(keys, f32),
            np.ones(keys, np.int8),
            np.empty((group, leaves // GROUP), f32),
            np.empty(group, f32),  # base
            np.empty(group, f32),  # means
            np.empty(TILE, np.int64),
            np.empty(BINS, np.int32),
        )
