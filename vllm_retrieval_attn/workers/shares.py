"""Who searches what of a message, and what becomes of the parts.

The share of a lane follows from the message alone: the (row, KV head) units of its actor are laid end to end,
weighted by their work, and cut into ``threads`` equal parts. A unit's indexed segments come first, in nodes
(index/segment.py), then the keys that are scanned exactly.
"""

from typing import Any

import numpy as np

from vllm_retrieval_attn.index.kernels import TILE, attend_rows, jit, load_rows
from vllm_retrieval_attn.index.search import COUNT_EXACT, MAX_NODES, attend_nodes
from vllm_retrieval_attn.index.segment import NODE
from vllm_retrieval_attn.store.layout import ROW_BUDGET, ROW_INDEXED, ROW_Q, ROW_RERANK, ROW_TABLE, ROW_TAIL, ROW_TOKENS

NODE_WORK = 32
"""Work of a node (256 keys) of an indexed segment, in keys scanned exactly: what dividing work among lanes goes by."""


@jit
def lane_cut(total: int, part: int, parts: int) -> int:
    """Start of part ``part`` of ``parts`` when ``total`` keys are cut at multiples of TILE."""
    tiles = (total + TILE - 1) // TILE
    return min(total, tiles * part // parts * TILE)


@jit
def unit_work(tokens: int, indexed: int, segment_tokens: int) -> int:
    """Length of a (row, KV head) unit: its keys to scan, and NODE_WORK for every node of its indexed segments."""
    return tokens - indexed * segment_tokens * (NODE - NODE_WORK) // NODE


@jit
def attend_unit(
    begin: int,
    end: int,
    row: Any,
    head: int,
    kv_heads: int,
    dim: int,
    layers: int,
    page_tokens: int,
    dtype: int,
    segment_tokens: int,
    slab_bytes: int,
    layer: int,
    table: Any,
    slab_table: Any,
    pages16: Any,
    pages32: Any,
    index8: Any,
    index16: Any,
    index32: Any,
    index64: Any,
    at: Any,
    q: Any,
    acc: Any,
    top: Any,
    total: Any,
    work: Any,
    index_work: Any,
    slabs: Any,
    counts: Any,
    chosen: Any,
) -> None:
    """Fold work ``[begin, end)`` of a unit into its running softmax: nodes of indexed segments first, then single
    keys."""
    tokens, indexed = row[ROW_TOKENS], row[ROW_INDEXED]
    head_elements = page_tokens * dim
    layer_elements = kv_heads * 2 * head_elements
    row_base = layer * layer_elements + head * 2 * head_elements
    page_stride = layers * layer_elements
    nodes = indexed * segment_tokens // NODE
    zone = nodes * NODE_WORK
    if begin < zone:
        first = (begin + NODE_WORK - 1) // NODE_WORK
        last = min(nodes, (end + NODE_WORK - 1) // NODE_WORK)
        for segment in range(indexed):
            slabs[segment] = slab_table[segment] + (layer * kv_heads + head) * slab_bytes
        budget = row[ROW_BUDGET] * 1e-6
        while first < last:
            stop = min(last, first + MAX_NODES)
            rerank = max(TILE, row[ROW_RERANK] * (stop - first) // nodes)
            attend_nodes(
                index8, index16, index32, index64, index8.ctypes.data, slabs, at, segment_tokens // NODE, first, stop,
                pages16, pages32, dtype, table, page_tokens, page_stride, row_base, head_elements, q, budget, rerank,
                row[ROW_TAIL], acc, top, total, *work, *index_work, counts, chosen,
            )  # fmt: skip
            first = stop
    t = max(begin - zone, 0) + indexed * segment_tokens
    last_token = max(end - zone, 0) + indexed * segment_tokens
    while t < min(last_token, tokens):
        offset = t % page_tokens
        m = min(page_tokens - offset, last_token - t)
        k_start = table[t // page_tokens] * page_stride + row_base + offset * dim
        attend_rows(pages16, pages32, dtype, k_start, k_start + head_elements, m, q, acc, top, total, *work)
        counts[COUNT_EXACT] += m
        t += m


@jit
def search_share(
    actor: int,
    thread: int,
    actors: int,
    threads: int,
    kv_heads: int,
    group: int,
    dim: int,
    layers: int,
    page_tokens: int,
    dtype: int,
    segment_tokens: int,
    slab_bytes: int,
    scale: float,
    layer: int,
    rows_n: int,
    rows: Any,
    tables: Any,
    slab_tables: Any,
    queries16: Any,
    queries32: Any,
    pages16: Any,
    pages32: Any,
    index8: Any,
    index16: Any,
    index32: Any,
    index64: Any,
    at: Any,
    partials: Any,
    q: Any,
    q_bits: Any,
    acc: Any,
    top: Any,
    total: Any,
    work: Any,
    index_work: Any,
    slabs: Any,
    counts: Any,
    chosen: Any,
) -> None:
    """Attention of one lane over its share of a message; adds what it touched to ``counts``.

    Writes one slot ``partials[unit + thread]`` (group * dim outputs, then group LSEs) for each unit that it touches.
    """
    own = (kv_heads - actor + actors - 1) // actors
    length = 0
    for r in range(rows_n):
        length += unit_work(rows[r, ROW_TOKENS], rows[r, ROW_INDEXED], segment_tokens) * own
    first = lane_cut(length, thread, threads)
    last = lane_cut(length, thread + 1, threads)
    position = 0
    for r in range(rows_n):
        n = unit_work(rows[r, ROW_TOKENS], rows[r, ROW_INDEXED], segment_tokens)
        for o in range(own):
            begin = max(first - position, 0)
            end = min(last - position, n)
            position += n
            if begin >= end:
                continue
            head = actor + o * actors
            source = (rows[r, ROW_Q] * kv_heads + head) * group * dim
            load_rows(queries16, queries32, dtype, source, group, dim, q, q_bits)
            for i in range(group):
                top[i] = -np.inf
                total[i] = 0.0
                for j in range(dim):
                    q[i, j] *= scale
                    acc[i, j] = 0.0
            attend_unit(
                begin, end, rows[r], head, kv_heads, dim, layers, page_tokens, dtype, segment_tokens, slab_bytes, layer,
                tables[rows[r, ROW_TABLE]], slab_tables[rows[r, ROW_TABLE]], pages16, pages32, index8, index16,
                index32, index64, at, q, acc, top, total, work, index_work, slabs, counts, chosen,
            )  # fmt: skip
            slot = r * own + o + thread
            for i in range(group):
                if total[i] > 0:
                    for j in range(dim):
                        partials[slot, i * dim + j] = acc[i, j] / total[i]
                    partials[slot, group * dim + i] = top[i] + np.log(total[i])
                else:  # a cut that holds no whole node
                    for j in range(dim):
                        partials[slot, i * dim + j] = 0.0
                    partials[slot, group * dim + i] = -np.inf


@jit
def gather_partials(
    actors: int, threads: int, kv_heads: int, group: int, dim: int, segment_tokens: int, rows_n: int, rows: Any,
    partials: Any, out: Any, lse: Any,
) -> None:  # fmt: skip
    """Merge the partial results of all lanes by log-sum-exp.

    ``out`` (rows, heads, dim) float32 and ``lse`` (rows, heads) float32 are written for the first
    ``rows_n`` rows, in the order of the message.
    """
    for a in range(actors):
        own = (kv_heads - a + actors - 1) // actors
        keys = 0
        for r in range(rows_n):
            keys += unit_work(rows[r, ROW_TOKENS], rows[r, ROW_INDEXED], segment_tokens) * own
        position = 0
        thread = 0
        for r in range(rows_n):
            n = unit_work(rows[r, ROW_TOKENS], rows[r, ROW_INDEXED], segment_tokens)
            for o in range(own):
                head = a + o * actors
                for i in range(group):
                    lse[r, head * group + i] = -np.inf
                    for j in range(dim):
                        out[r, head * group + i, j] = 0.0
                while thread < threads - 1 and lane_cut(keys, thread + 1, threads) <= position:
                    thread += 1
                t = thread
                while t < threads and lane_cut(keys, t, threads) < position + n:
                    if max(lane_cut(keys, t, threads), position) < min(lane_cut(keys, t + 1, threads), position + n):
                        slot = r * own + o + t
                        for i in range(group):
                            h = head * group + i
                            mine = partials[a, slot, group * dim + i]
                            best = max(lse[r, h], mine)
                            if best == -np.inf:
                                continue
                            old = np.exp(lse[r, h] - best)
                            new = np.exp(mine - best)
                            both = old + new
                            for j in range(dim):
                                out[r, h, j] = (out[r, h, j] * old + partials[a, slot, i * dim + j] * new) / both
                            lse[r, h] = best + np.log(both)
                    t += 1
                position += n
