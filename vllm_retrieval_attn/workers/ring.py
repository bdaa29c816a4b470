"""The ring between the vLLM worker and its CPU actors: one message a layer, no call in between.

The worker writes the rows of a layer into the shared file and raises ``WORD_SEQ``. Every lane (a
search thread of an actor) sees the new number, does its share, writes partial results and puts the
number into its own done word. A lane that finds nothing to do yields, then sleeps on a futex, so an
idle server uses no core. A restarted lane finds its done word behind ``WORD_SEQ`` and does the
request again: nothing else needs to be recovered.

The share of a lane follows from the message alone: the (row, KV head) units of its actor are laid
end to end, weighted by their host tokens, and cut into ``threads`` equal parts.
"""

from typing import Any

import numpy as np

from vllm_retrieval_attn.index.kernels import TILE, attend_rows, jit, load_rows
from vllm_retrieval_attn.store.layout import (
    FIXED_WORDS,
    LANE_AWAITED,
    LANE_DONE,
    LANE_SLEEPING,
    LANE_WORDS,
    MSG_LAYER,
    MSG_ROWS,
    ROW_Q,
    ROW_TABLE,
    ROW_TOKENS,
    STAT_KEYS,
    STAT_NS,
    WORD_SEQ,
    WORD_STOP,
)
from vllm_retrieval_attn.workers.sync import fence, futex_wait, futex_wake, read_clock_ns, sched_yield

STOPPED, IDLE = 1, 0


@jit
def lane_cut(total: int, part: int, parts: int) -> int:
    """Start of part ``part`` of ``parts`` when ``total`` keys are cut at multiples of TILE."""
    tiles = (total + TILE - 1) // TILE
    return min(total, tiles * part // parts * TILE)


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
    scale: float,
    layer: int,
    rows_n: int,
    rows: Any,
    tables: Any,
    queries16: Any,
    queries32: Any,
    pages16: Any,
    pages32: Any,
    partials: Any,
    q: Any,
    q_bits: Any,
    acc: Any,
    top: Any,
    total: Any,
    tile: Any,
    tile_bits: Any,
    scores: Any,
    exp_bits: Any,
    exp_scale: Any,
) -> int:
    """Exact attention of one lane over its share of a message; returns the keys it scored.

    Writes one slot ``partials[unit + thread]`` (group * dim outputs, then group LSEs) for each unit
    that it touches.
    """
    own = (kv_heads - actor + actors - 1) // actors
    keys = 0
    for r in range(rows_n):
        keys += rows[r, ROW_TOKENS] * own
    first = lane_cut(keys, thread, threads)
    last = lane_cut(keys, thread + 1, threads)
    head_elements = page_tokens * dim
    layer_elements = kv_heads * 2 * head_elements
    position = 0
    for r in range(rows_n):
        n = rows[r, ROW_TOKENS]
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
            t = begin
            while t < end:
                page = tables[rows[r, ROW_TABLE], t // page_tokens]
                offset = t % page_tokens
                m = min(page_tokens - offset, end - t)
                base = (page * layers + layer) * layer_elements + head * 2 * head_elements
                k_start = base + offset * dim
                attend_rows(
                    pages16, pages32, dtype, k_start, k_start + head_elements, m, q, acc, top, total,
                    tile, tile_bits, scores, exp_bits, exp_scale,
                )  # fmt: skip
                t += m
            slot = r * own + o + thread
            for i in range(group):
                for j in range(dim):
                    partials[slot, i * dim + j] = acc[i, j] / total[i]
                partials[slot, group * dim + i] = top[i] + np.log(total[i])
    return last - first


@jit
def serve_lane(
    words: Any,
    word_address: int,
    header: Any,
    rows: Any,
    stats: Any,
    tables: Any,
    queries16: Any,
    queries32: Any,
    pages16: Any,
    pages32: Any,
    partials: Any,
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
    scale: float,
    spin_ns: int,
    until_ns: int,
    q: Any,
    q_bits: Any,
    acc: Any,
    top: Any,
    total: Any,
    tile: Any,
    tile_bits: Any,
    scores: Any,
    exp_bits: Any,
    exp_scale: Any,
    timeout: Any,
) -> int:
    """Serve one lane until ``until_ns`` (CLOCK_MONOTONIC); returns STOPPED or IDLE.

    ``word_address`` is the address of ``words[0]``; words lie 64 bytes apart. ``timeout`` is an int64
    timespec (s, ns) for one sleep.
    """
    lane = actor * threads + thread
    base = FIXED_WORDS + lane * LANE_WORDS
    quiet_since = read_clock_ns()
    while True:
        fence()
        if words[WORD_STOP] != 0:
            return STOPPED
        seq = words[WORD_SEQ]
        if words[base + LANE_DONE] != seq:
            fence()
            start = read_clock_ns()
            scored = search_share(
                actor, thread, actors, threads, kv_heads, group, dim, layers, page_tokens, dtype, scale,
                header[MSG_LAYER], header[MSG_ROWS], rows, tables, queries16, queries32, pages16, pages32,
                partials, q, q_bits, acc, top, total, tile, tile_bits, scores, exp_bits, exp_scale,
            )  # fmt: skip
            now = read_clock_ns()
            stats[lane, STAT_NS] = now - start
            stats[lane, STAT_KEYS] = scored
            fence()
            words[base + LANE_DONE] = seq
            fence()
            if words[base + LANE_AWAITED] != 0:
                futex_wake(word_address + (base + LANE_DONE) * 64)
            quiet_since = now
            continue
        now = read_clock_ns()
        if now > until_ns:
            return IDLE
        if now - quiet_since < spin_ns:
            sched_yield()
            continue
        words[base + LANE_SLEEPING] = 1
        fence()
        if words[WORD_SEQ] == seq and words[WORD_STOP] == 0:
            futex_wait(word_address + WORD_SEQ * 64, seq, timeout.ctypes.data)
        words[base + LANE_SLEEPING] = 0


@jit
def raise_seq(words: Any, word_address: int, lanes: int, seq: int) -> None:
    """Publish request ``seq`` and wake the lanes that sleep. The message must be complete."""
    fence()
    words[WORD_SEQ] = np.int32(seq)
    fence()
    for lane in range(lanes):
        if words[FIXED_WORDS + lane * LANE_WORDS + LANE_SLEEPING] != 0:
            futex_wake(word_address + WORD_SEQ * 64)
            return


@jit
def await_lanes(words: Any, word_address: int, lanes: int, seq: int, spin_ns: int, limit_ns: int, timeout: Any) -> int:
    """Wait until every lane has done ``seq``, at most ``limit_ns``; returns how many have not.

    Yields for ``spin_ns``, then sleeps on the done word of a lane that is late.
    """
    start = read_clock_ns()
    lane = 0
    while lane < lanes:
        base = FIXED_WORDS + lane * LANE_WORDS
        fence()
        done = words[base + LANE_DONE]
        if done == seq:
            lane += 1
            continue
        elapsed = read_clock_ns() - start
        if elapsed > limit_ns:
            return lanes - lane
        if elapsed < spin_ns:
            sched_yield()
            continue
        words[base + LANE_AWAITED] = 1
        fence()
        if words[base + LANE_DONE] == done:
            futex_wait(word_address + (base + LANE_DONE) * 64, done, timeout.ctypes.data)
        words[base + LANE_AWAITED] = 0
    return 0


@jit
def gather_partials(
    actors: int, threads: int, kv_heads: int, group: int, dim: int, rows_n: int, rows: Any, partials: Any,
    out: Any, lse: Any,
) -> None:  # fmt: skip
    """Merge the partial results of all lanes by log-sum-exp.

    ``out`` (rows, heads, dim) float32 and ``lse`` (rows, heads) float32 are written for the first
    ``rows_n`` rows, in the order of the message.
    """
    for a in range(actors):
        own = (kv_heads - a + actors - 1) // actors
        keys = 0
        for r in range(rows_n):
            keys += rows[r, ROW_TOKENS] * own
        position = 0
        thread = 0
        for r in range(rows_n):
            n = rows[r, ROW_TOKENS]
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
                            old = np.exp(lse[r, h] - best)
                            new = np.exp(mine - best)
                            both = old + new
                            for j in range(dim):
                                out[r, h, j] = (out[r, h, j] * old + partials[a, slot, i * dim + j] * new) / both
                            lse[r, h] = best + np.log(both)
                    t += 1
                position += n
