"""The ring between the vLLM worker and its CPU actors: one message a layer, no call in between.

The worker writes the rows of a layer into the shared file and raises ``WORD_SEQ``. Every lane (a
search thread of an actor) sees the new number, does its share (workers/shares.py), writes partial results and puts the
number into its own done word. A lane that finds nothing to do yields, then sleeps on a futex, so an
idle server uses no core (workers/signals.py). A restarted lane finds its done word behind ``WORD_SEQ`` and does the
request again: nothing else needs to be recovered.
"""

from typing import Any

from vllm_retrieval_attn.index.kernels import jit
from vllm_retrieval_attn.index.search import COUNT_EXACT, COUNT_KEYS
from vllm_retrieval_attn.store.layout import MSG_LAYER, MSG_ROWS, STAT_CODES, STAT_KEYS, STAT_NS, WORD_STOP
from vllm_retrieval_attn.workers.shares import search_share
from vllm_retrieval_attn.workers.signals import await_message, finish_message
from vllm_retrieval_attn.workers.sync import read_clock_ns

STOPPED, IDLE = 1, 0


@jit
def serve_lane(
    words: Any,
    word_address: int,
    header: Any,
    rows: Any,
    stats: Any,
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
    spin_ns: int,
    until_ns: int,
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
    timeout: Any,
) -> int:
    """Serve one lane until ``until_ns`` (CLOCK_MONOTONIC); returns STOPPED or IDLE.

    ``word_address`` is the address of ``words[0]``; words lie 64 bytes apart. ``timeout`` is an int64
    timespec (s, ns) for one sleep.
    """
    lane = actor * threads + thread
    while True:
        seq = await_message(words, word_address, lane, spin_ns, until_ns, timeout)
        if seq < 0:
            return STOPPED if words[WORD_STOP] != 0 else IDLE
        start = read_clock_ns()
        counts[:] = 0
        search_share(
            actor, thread, actors, threads, kv_heads, group, dim, layers, page_tokens, dtype, segment_tokens,
            slab_bytes, scale, header[MSG_LAYER], header[MSG_ROWS], rows, tables, slab_tables, queries16, queries32,
            pages16, pages32, index8, index16, index32, index64, at, partials, q, q_bits, acc, top, total, work,
            index_work, slabs, counts, chosen,
        )  # fmt: skip
        stats[lane, STAT_NS] = read_clock_ns() - start
        stats[lane, STAT_CODES] = counts[COUNT_KEYS]
        stats[lane, STAT_KEYS] = counts[COUNT_EXACT]
        finish_message(words, word_address, lane, seq)
