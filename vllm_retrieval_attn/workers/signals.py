# SPDX-License-Identifier: Apache-2.0
"""Words of the shared file by which the vLLM worker and the actors wake and await each other (workers/lane.py)."""

from typing import Any

import numpy as np

from vllm_retrieval_attn.index.rows import jit
from vllm_retrieval_attn.store.layout import (
    ACTOR_AWAITED,
    ACTOR_DONE,
    ACTOR_SLEEPING,
    ACTOR_WORDS,
    FIXED_WORDS,
    WORD_AWAKE,
    WORD_SEQ,
    WORD_STOP,
)
from vllm_retrieval_attn.workers.sync import fence, futex_wait, futex_wake, read_clock_ns, sched_yield


@jit
def await_message(
    words: Any, word_address: int, actor: int, spin_ns: int, until_ns: int, timeout: Any
) -> int:  # fmt: skip
    """Wait for a message that the actor has not done; returns its number, or -1 at ``until_ns`` or a stop."""
    base = FIXED_WORDS + actor * ACTOR_WORDS
    quiet_since = read_clock_ns()
    while True:
        fence()
        seq = words[WORD_SEQ]
        now = read_clock_ns()
        if words[WORD_STOP] != 0:
            return -1
        if words[base + ACTOR_DONE] != seq:
            fence()
            return seq
        if now > until_ns:
            return -1
        if words[WORD_AWAKE] != 0 or now - quiet_since < spin_ns:
            sched_yield()
            continue
        words[base + ACTOR_SLEEPING] = 1
        fence()
        if words[WORD_SEQ] == seq and words[WORD_STOP] == 0:
            futex_wait(word_address + WORD_SEQ * 64, seq, timeout.ctypes.data)
        words[base + ACTOR_SLEEPING] = 0


@jit
def finish_message(words: Any, word_address: int, actor: int, seq: int) -> None:
    """Tell the client that the actor has done ``seq``. Its partial results must be complete."""
    base = FIXED_WORDS + actor * ACTOR_WORDS
    fence()
    words[base + ACTOR_DONE] = np.int32(seq)
    fence()
    if words[base + ACTOR_AWAITED] != 0:
        futex_wake(word_address + (base + ACTOR_DONE) * 64)


@jit
def raise_seq(words: Any, word_address: int, actors: int, seq: int) -> None:
    """Publish request ``seq`` and wake the actors that sleep. The message must be complete."""
    fence()
    words[WORD_SEQ] = np.int32(seq)
    fence()
    for actor in range(actors):
        if words[FIXED_WORDS + actor * ACTOR_WORDS + ACTOR_SLEEPING] != 0:
            futex_wake(word_address + WORD_SEQ * 64)
            return


@jit
def await_actors(
    words: Any, word_address: int, actors: int, seq: int, spin_ns: int, limit_ns: int, timeout: Any
) -> int:
    """Wait until every actor has done ``seq``, at most ``limit_ns``; returns how many have not.

    Yields for ``spin_ns``, then sleeps on the done word of a actor that is late.
    """
    start = read_clock_ns()
    actor = 0
    while actor < actors:
        base = FIXED_WORDS + actor * ACTOR_WORDS
        fence()
        done = words[base + ACTOR_DONE]
        if done == seq:
            actor += 1
            continue
        elapsed = read_clock_ns() - start
        if elapsed > limit_ns:
            return actors - actor
        if elapsed < spin_ns:
            sched_yield()
            continue
        words[base + ACTOR_AWAITED] = 1
        fence()
        if words[base + ACTOR_DONE] == done:
            futex_wait(word_address + (base + ACTOR_DONE) * 64, done, timeout.ctypes.data)
        words[base + ACTOR_AWAITED] = 0
    return 0
