"""Words of the shared file by which the vLLM worker and the lanes wake and await each other (workers/ring.py)."""

from typing import Any

import numpy as np

from vllm_retrieval_attn.index.rows import jit
from vllm_retrieval_attn.store.layout import (
    FIXED_WORDS,
    LANE_AWAITED,
    LANE_DONE,
    LANE_SLEEPING,
    LANE_WORDS,
    WORD_SEQ,
    WORD_STOP,
)
from vllm_retrieval_attn.workers.sync import fence, futex_wait, futex_wake, read_clock_ns, sched_yield


@jit
def await_message(
    words: Any, word_address: int, lane: int, spin_ns: int, until_ns: int, timeout: Any
) -> int:  # fmt: skip
    """Wait for a message that the lane has not done; returns its number, or -1 at ``until_ns`` or a stop."""
    base = FIXED_WORDS + lane * LANE_WORDS
    quiet_since = read_clock_ns()
    while True:
        fence()
        seq = words[WORD_SEQ]
        now = read_clock_ns()
        if words[WORD_STOP] != 0:
            return -1
        if words[base + LANE_DONE] != seq:
            fence()
            return seq
        if now > until_ns:
            return -1
        if now - quiet_since < spin_ns:
            sched_yield()
            continue
        words[base + LANE_SLEEPING] = 1
        fence()
        if words[WORD_SEQ] == seq and words[WORD_STOP] == 0:
            futex_wait(word_address + WORD_SEQ * 64, seq, timeout.ctypes.data)
        words[base + LANE_SLEEPING] = 0


@jit
def finish_message(words: Any, word_address: int, lane: int, seq: int) -> None:
    """Tell the client that the lane has done ``seq``. Its partial results must be complete."""
    base = FIXED_WORDS + lane * LANE_WORDS
    fence()
    words[base + LANE_DONE] = np.int32(seq)
    fence()
    if words[base + LANE_AWAITED] != 0:
        futex_wake(word_address + (base + LANE_DONE) * 64)


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
