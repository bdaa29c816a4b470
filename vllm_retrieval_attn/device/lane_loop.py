# SPDX-License-Identifier: Apache-2.0
"""What a CPU lane does, compiled and without Python's lock: wait for a layer, attend to the rows that the GPU posts,
leave partials (decode_lanes.cuh)."""

from typing import Any, NamedTuple

import numpy as np

from vllm_retrieval_attn.device.board import COUNT, DONE, HANDED, HOMES, LAYER, LINE, MESSAGES, PLACE, POSTED
from vllm_retrieval_attn.device.peek import load16, load32, peek64, poke64, touch
from vllm_retrieval_attn.index.rows import (
    Running,
    Scratch,
    attend_picked,
    clear,
    fetch_row,
    jit,
    keep,
    running,
    scratch,
)
from vllm_retrieval_attn.index.vector import widen
from vllm_retrieval_attn.workers.sync import atomic_add, fence, futex_wait, futex_wake, read_clock_ns, sched_yield

_PAGE_BITS, _RUN_TOKENS = 10, 4096
_PAGE = 1 << _PAGE_BITS
_LISTED = 4 * POSTED
"""Rows that a lane lists before it attends to them."""
_FETCHED = 48
"""Of these, how many are on their way from memory already: what fits in L1."""
_TURNS = 64
"""Looks at the board between two looks at the clock, after which other threads of this core may run."""
STOP, OPEN, SLEEPING = 0, 16, 32
WORDS = 48
"""int32 words, each on a line of its own: the host says stop; it opens a step; lanes that sleep, in 64 bits."""


class LaneMemory(NamedTuple):
    """Memory of one lane.

    Attributes:
        q: (g, d) float32 queries. starts: (_LISTED,) int64, log_pi: float32, of the rows listed. run, work:
        index/rows.py.
    """

    q: Any
    starts: Any
    log_pi: Any
    run: Running
    work: Scratch


def lane_memory(group: int, dim: int) -> LaneMemory:
    """Of a lane of ``group`` query heads of size ``dim``."""
    q, starts, log_pi = np.zeros((group, dim), np.float32), np.zeros(_LISTED, np.int64), np.zeros(_LISTED, np.float32)
    return LaneMemory(q, starts, log_pi, running(group, dim), scratch(group))


@jit
def _list(message: int, places: Any, count: int, rows: Any, starts: Any, log_pi: Any, listed: int) -> int:
    """Add the rows of the message at address ``message`` to those listed. A row that does not lie in the arena, and all
    after it, are left out."""
    tokens, weights, homes = message + places.tokens, message + places.log_pi, message + 8 * HOMES
    for t in range(min(count, POSTED)):
        token = load16(tokens + 2 * t)
        home = peek64(homes + 8 * (token >> _PAGE_BITS)) if token < _RUN_TOKENS else -1
        if home < 0 or home > places.home_limit:
            break
        starts[listed] = home + (token & (_PAGE - 1)) * 2 * places.dim
        log_pi[listed] = load32(weights + 4 * t)
        if listed < _FETCHED:
            fetch_row(rows, starts[listed], 2 * places.dim)
        listed += 1
    return listed


@jit
def _leave(board: Any, places: Any, at: int, run: Any) -> None:
    """Write the partial of the runs from ``at`` on."""
    width = places.dim + 2
    begin = (places.parts + at * places.part) // 4
    keep(run, board.floats[begin : begin + places.group * width].reshape(places.group, width))


@jit
def _do_layer(
    board: Any, places: Any, rows: Any, memory: Any, lane: int, lanes: int, layer: int, scale: Any, words: Any
) -> bool:
    """The lane's part of a layer; False: it was told to stop.

    Rows are listed as they are posted, and attended to where the next message is not there yet or is another head's.
    """
    base = board.words.ctypes.data
    handed = peek64(base + 8 * HANDED)
    first, last = lane * handed // lanes, (lane + 1) * handed // lanes
    begun, asked, segment, listed = False, False, first, 0
    for at in range(first, last):
        message, turns = base + MESSAGES + at * places.message, 0
        while peek64(message) != layer:
            if listed > 0:
                attend_picked(rows, memory.starts, memory.log_pi, listed, memory.q, memory.run, memory.work)
                listed = 0
            turns += 1
            if turns % _TURNS == 0:
                fence()
                if words[STOP] != 0:
                    return False
        if at + 1 < last:
            for offset in (0, places.log_pi, places.tokens):
                touch(message + places.message + offset)
        count, place = peek64(message + 8 * COUNT), peek64(message + 8 * PLACE)
        ends = begun and (count < 0 or place == 0)
        if listed > 0 and (ends or listed + POSTED > _LISTED):
            attend_picked(rows, memory.starts, memory.log_pi, listed, memory.q, memory.run, memory.work)
            listed = 0
        if ends:
            _leave(board, places, segment, memory.run)
            begun = False
        if count < 0:  # the GPU keeps it; what comes next has a partial of its own
            continue
        if not begun:
            clear(memory.run)
            begun, asked, segment = True, False, at
        if count > 0 and not asked:
            widen(message + places.queries, rows.dtype, places.group * places.dim, scale, memory.q.ctypes.data)
            asked = True
        listed = _list(message, places, count, rows, memory.starts, memory.log_pi, listed)
    if listed > 0:
        attend_picked(rows, memory.starts, memory.log_pi, listed, memory.q, memory.run, memory.work)
    if begun:
        _leave(board, places, segment, memory.run)
    poke64(base + DONE + lane * LINE, layer)
    return True


@jit
def serve(
    board: Any,
    places: Any,
    rows: Any,
    memory: Any,
    lane: int,
    lanes: int,
    scale: Any,
    words: Any,
    idle_ns: int,
    on: int,
) -> None:
    """Do layers until the host says stop.

    Args:
        board, places: device/board.py. rows: Memory of the arena (index/rows.py). memory: LaneMemory. lane: number of
        this one of ``lanes``. scale: float32, of the softmax. words: WORDS int32. idle_ns: after so long without a
        layer it sleeps until a step is opened. on: 0: return at once.
    """
    since, turns, timeout = read_clock_ns(), 0, np.array([0, 200_000_000])
    base, opened = board.words.ctypes.data, words[OPEN]
    while on != 0:
        layer = peek64(base + 8 * LAYER)
        if layer != peek64(base + DONE + lane * LINE):
            if not _do_layer(board, places, rows, memory, lane, lanes, layer, scale, words):
                return
            since, opened = read_clock_ns(), words[OPEN]
            continue
        turns += 1
        if turns % _TURNS != 0:
            continue
        fence()
        if words[STOP] != 0:
            return
        if words[OPEN] != opened:
            since, opened = read_clock_ns(), words[OPEN]
        if read_clock_ns() - since < idle_ns:
            sched_yield()
            continue
        atomic_add(words.ctypes.data + 4 * SLEEPING, 1)
        fence()
        if words[OPEN] == opened and words[STOP] == 0:
            futex_wait(words.ctypes.data + 4 * OPEN, opened, timeout.ctypes.data)
        atomic_add(words.ctypes.data + 4 * SLEEPING, -1)


@jit
def wake(words: Any) -> None:
    """Open a step: lanes that sleep begin to look for layers."""
    words[OPEN] += 1
    fence()
    if words[SLEEPING] != 0:
        futex_wake(words.ctypes.data + 4 * OPEN)
