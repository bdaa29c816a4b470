# SPDX-License-Identifier: Apache-2.0
"""Doing the units of a message (workers/desk.py), by the threads of an actor side by side, without Python's lock.

A thread takes the next unit by an atomic counter. When all units are taken, threads take them once more the same way,
to weigh what was found, and a third time, to draw rows and attend to them; whoever does the last one of a task adds
up what the next step needs of all (index/choosing.py), or writes the task's result. No two threads write the same
memory, and the sums of a task run in one order whoever does what.
"""

from typing import Any

import numba
import numpy as np

from vllm_retrieval_attn.index.choosing import Found, draw, join, lift, raised_tau, seed_of, weigh
from vllm_retrieval_attn.index.elsewhere import attend_picked_from, attend_run_from
from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import add_parts, clear, finish, jit, keep, load
from vllm_retrieval_attn.index.search import Place, find_thresholds, product, search_shard, shard_keys, turn
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.workers.desk import (
    ACTIVE,
    CHOSEN,
    CODES,
    EXACT_PIECE,
    FAILED,
    JOINED,
    LEFT,
    NEXT,
    OVER,
    PIECE,
    ROWS,
    SEQ,
    SLEEPERS,
    TASK_BASE,
    TASK_CENTRE,
    TASK_CODES,
    TASK_COUNT,
    TASK_DEVIATIONS,
    TASK_DONE,
    TASK_FAILED,
    TASK_FIRST,
    TASK_FOLDED,
    TASK_HEAD,
    TASK_INDEXED,
    TASK_LAYER,
    TASK_LIMIT,
    TASK_MEANS,
    TASK_OBJECTS,
    TASK_POSITION,
    TASK_PROBED,
    TASK_ROW,
    TASK_SAMPLES,
    TASK_SEED,
    TASK_STATE,
    TASK_TABLE,
    TASK_TOKENS,
    TASK_TURN,
    TASK_UNITS,
    TASK_WEIGHED,
    TASKS,
    TURN,
    UNIT_NUMBER,
    UNIT_TASK,
    UNITS,
    UNTURNED,
    WEIGH,
)
from vllm_retrieval_attn.workers.sync import (
    atomic_add,
    fence,
    futex_wait,
    futex_wake,
    read_clock_ns,
    sched_yield,
)
from vllm_retrieval_attn.workers.tasks import arrays_of


@jit
def _found(arrays: Any, t: int, first: int, last: int) -> Any:
    """What is found in units ``[first, last)`` of a task."""
    return Found(
        arrays.scores[first:last], arrays.ids[first:last], arrays.starts[first:last], arrays.floors[first:last],
        arrays.shifts[t], arrays.firsts[first:last], arrays.sizes[first:last], arrays.tops[first:last],
        arrays.sums[first:last], arrays.rests[first:last], arrays.shares[first:last], arrays.counts[first:last],
        arrays.rest[first:last], arrays.bins[first:last], arrays.masses[first:last], arrays.below[first:last],
    )  # fmt: skip


@jit
def _turn(arrays: Any, t: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Load the queries of a task, scaled, turn them into the space of its codes, and find their thresholds."""
    task, queries, turned = arrays.tasks[t], arrays.queries[t], arrays.turned[t]
    g, d = geometry.group, geometry.dim
    start = (task[TASK_ROW] * geometry.kv_heads + task[TASK_HEAD]) * g * d
    searched = task[TASK_INDEXED] > 0 and task[TASK_FAILED] == 0
    for i in range(g):
        load(shared.queries, start + i * d, d, queries[i])
        if searched:
            turn(numba.carray(pointer_to(task[TASK_TURN]), (d, d), np.float32), queries[i], turned[i])
            centre = numba.carray(pointer_to(task[TASK_CENTRE]), (d,), np.float32)
            arrays.shifts[t, i] = product(centre, queries[i])
        for j in range(d):
            queries[i, j] *= geometry.scale
    if searched:
        samples = numba.carray(pointer_to(task[TASK_SAMPLES]), (task[TASK_UNITS],), np.int64)
        find_thresholds(samples, task[TASK_INDEXED], geometry.candidates, turned, lane.search, arrays.thresholds[t])


@jit
def _search(arrays: Any, u: int, t: int, geometry: Any, lane: Any) -> int:
    """Candidates of one shard; returns its keys."""
    d = geometry.dim
    task, s = arrays.tasks[t], arrays.units[u, UNIT_NUMBER]
    shards = task[TASK_UNITS]
    mean = numba.carray(pointer_to(task[TASK_MEANS]), (shards, d), np.float32)[s]
    deviation = numba.carray(pointer_to(task[TASK_DEVIATIONS]), (shards, d), np.float32)[s]
    index = numba.carray(pointer_to(task[TASK_OBJECTS]), (shards,), np.int64)[s]
    codes = numba.carray(pointer_to(task[TASK_CODES]), (shards,), np.int64)[s]
    size = shard_keys(s, task[TASK_INDEXED])
    arrays.firsts[u], arrays.sizes[u] = s * SHARD_TOKENS, size
    found = _found(arrays, t, u, u + 1)
    place = Place(index, codes, mean, deviation)
    search_shard(geometry.native, place, arrays.turned[t], arrays.thresholds[t], lane.search, 0, found)
    lift(found, 0, geometry.scale)
    return size


@jit
def _attend_exactly(task: Any, first: int, last: int, queries: Any, geometry: Any, shared: Any, lane: Any) -> int:
    """Fold rows ``[first, last)`` of a task into the lane's softmax; returns how many, -1 where they lie nowhere
    or can not be read."""
    table = shared.tables[task[TASK_TABLE]]
    at = first
    while at < last:
        offset = at % geometry.page_tokens
        count = min(geometry.page_tokens - offset, last - at)
        page = table[at // geometry.page_tokens]
        if page < 0 or page >= geometry.pages:
            return -1
        start = page * geometry.page_elements + task[TASK_BASE] + offset * 2 * geometry.dim
        if not attend_run_from(shared.source, start, count, queries, lane.run, lane.work, lane.held):
            return -1
        at += count
    return last - first


@jit
def _attend_piece(arrays: Any, u: int, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    task = arrays.tasks[t]
    first = arrays.units[u, UNIT_NUMBER] * EXACT_PIECE
    last = min(first + EXACT_PIECE, task[TASK_TOKENS])
    clear(lane.run)
    count = _attend_exactly(task, first, last, arrays.queries[t], geometry, shared, lane)
    keep(lane.run, arrays.parts[u])
    return count


@jit
def _draw(arrays: Any, u: int, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    """Draw a unit's rows and attend to them; returns how many, -1 where they lie nowhere or can not be read."""
    task, choice = arrays.tasks[t], lane.choice
    seed = seed_of(task[TASK_SEED], task[TASK_POSITION], task[TASK_LAYER], geometry.first_head + task[TASK_HEAD])
    count = draw(_found(arrays, t, u, u + 1), 0, arrays.raised[t], seed, choice)
    place = atomic_add(task.ctypes.data + TASK_COUNT * 8, count)
    if task[TASK_PROBED]:
        kept = shared.chosen[task[TASK_LAYER], task[TASK_HEAD]]
        if 1 + place + count > len(kept):
            return -1
        for n in range(count):
            kept[1 + place + n] = choice.ids[n]
    table = shared.tables[task[TASK_TABLE]]
    for n in range(count):
        page = table[choice.ids[n] // geometry.page_tokens]
        if page < 0 or page >= geometry.pages:
            return -1
        offset = choice.ids[n] % geometry.page_tokens
        choice.ids[n] = page * geometry.page_elements + task[TASK_BASE] + offset * 2 * geometry.dim
    clear(lane.run)
    queries = arrays.queries[t]
    if not attend_picked_from(shared.source, choice.ids, choice.log_pi, count, queries, lane.run, lane.work, lane.held):
        return -1
    keep(lane.run, arrays.parts[u])
    return count


@jit
def _attend_tail(arrays: Any, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    """Attend to what lies beyond a task's index; returns how many rows, -1 where they can not be read."""
    task = arrays.tasks[t]
    clear(lane.run)
    tokens, queries = task[TASK_TOKENS], arrays.queries[t]
    count = _attend_exactly(task, task[TASK_INDEXED], tokens, queries, geometry, shared, lane)
    keep(lane.run, arrays.tails[t])
    return count


@jit
def _finish(arrays: Any, t: int, rows: int, place: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Write the result of a task."""
    g, d, task = geometry.group, geometry.dim, arrays.tasks[t]
    target = shared.partials[task[TASK_ROW], task[TASK_HEAD]]
    if task[TASK_FAILED] != 0:
        target[:] = FAILED
    else:
        clear(lane.run)
        add_parts(arrays.parts[task[TASK_FIRST] : task[TASK_FIRST] + task[TASK_UNITS]], lane.run)
        if task[TASK_INDEXED] > 0:
            add_parts(arrays.tails[t : t + 1], lane.run)
        finish(lane.run, lane.out, lane.lse)
        for i in range(g):
            for j in range(d):
                target[i * d + j] = lane.out[i, j]
            target[g * d + i] = lane.lse[i]
        shared.read[task[TASK_ROW], task[TASK_HEAD]] += rows
        if task[TASK_PROBED] and task[TASK_INDEXED] > 0:
            shared.chosen[task[TASK_LAYER], task[TASK_HEAD], 0] = task[TASK_COUNT]
    fence()
    task[TASK_STATE] = OVER
    atomic_add(place + LEFT * 8, -1)


@jit
def _last(task: Any, counter: int, of: int) -> bool:
    """Count one more; whether it is the last one."""
    return atomic_add(task.ctypes.data + counter * 8, 1) == of - 1


@jit
def _do_unit(arrays: Any, u: int, place: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Search a shard, or attend to a piece of a task without an index; whoever does the last unit of a task adds up, or
    finishes it."""
    t = arrays.units[u, UNIT_TASK]
    task = arrays.tasks[t]
    if task[TASK_FAILED] == 0:
        if task[TASK_INDEXED] > 0:
            atomic_add(place + CODES * 8, _search(arrays, u, t, geometry, lane))
        else:
            rows = _attend_piece(arrays, u, t, geometry, shared, lane)
            if rows < 0:
                task[TASK_FAILED] = 1
            else:
                atomic_add(place + ROWS * 8, rows)
    first, units, head, g = task[TASK_FIRST], task[TASK_UNITS], task[TASK_HEAD], geometry.group
    if not _last(task, TASK_DONE, units):
        return
    if task[TASK_INDEXED] > 0 and task[TASK_FAILED] == 0:
        outside = shared.outside[task[TASK_ROW], head * g : (head + 1) * g]
        join(_found(arrays, t, first, first + units), units, outside)
        fence()
        task[TASK_STATE] = JOINED
    else:
        _finish(arrays, t, task[TASK_TOKENS], place, geometry, shared, lane)


@jit
def _await_state(task: Any, state: int) -> bool:
    """Wait until a task is that far; whether it is not over yet."""
    # All units of the step before are taken by now, so somebody is at it, and waits for nothing but steps before that.
    while task[TASK_STATE] < state:
        sched_yield()
        fence()
    fence()  # what the state promises is read after it, on aarch64 too
    return task[TASK_STATE] != OVER


@jit
def _weigh_unit(arrays: Any, u: int, lane: Any) -> None:
    """Weigh what was found in a unit; whoever weighs the last one of a task finds its tau."""
    t = arrays.units[u, UNIT_TASK]
    task = arrays.tasks[t]
    if not _await_state(task, JOINED):
        return
    weigh(_found(arrays, t, u, u + 1), 0, arrays.taus[t], lane.choice)
    first, units = task[TASK_FIRST], task[TASK_UNITS]
    if _last(task, TASK_WEIGHED, units):
        arrays.raised[t] = raised_tau(_found(arrays, t, first, first + units), units, task[TASK_LIMIT], arrays.taus[t])
        fence()
        task[TASK_STATE] = CHOSEN


@jit
def _do_piece(arrays: Any, piece: int, place: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Attend to rows of a task: those beyond its index, or those drawn in a unit; whoever does the last piece finishes
    the task."""
    tasks = len(arrays.tasks)
    beyond = piece < tasks
    t = piece if beyond else arrays.units[piece - tasks, UNIT_TASK]
    task = arrays.tasks[t]
    if not _await_state(task, JOINED if beyond else CHOSEN):
        return
    if beyond:
        rows = _attend_tail(arrays, t, geometry, shared, lane)
    else:
        rows = _draw(arrays, piece - tasks, t, geometry, shared, lane)
    if rows < 0:
        task[TASK_FAILED] = 1
    else:
        atomic_add(place + ROWS * 8, rows)
    if _last(task, TASK_FOLDED, task[TASK_UNITS] + 1):
        read = task[TASK_COUNT] + task[TASK_TOKENS] - task[TASK_INDEXED]
        _finish(arrays, t, read, place, geometry, shared, lane)


@jit
def do_units(desk: Any, geometry: Any, shared: Any, lane: Any) -> None:
    """Do units of the open message until none is left."""
    arrays = arrays_of(desk, geometry)
    place = desk.ctypes.data
    while True:
        number = atomic_add(place + TURN * 8, 1)
        if number >= desk[TASKS]:
            break
        _turn(arrays, number, geometry, shared, lane)
        atomic_add(place + UNTURNED * 8, -1)
    fence()
    while desk[UNTURNED] > 0:
        fence()
    while True:
        u = atomic_add(place + NEXT * 8, 1)
        if u >= desk[UNITS]:
            break
        _do_unit(arrays, u, place, geometry, shared, lane)
    while True:
        u = atomic_add(place + WEIGH * 8, 1)
        if u >= desk[UNITS]:
            break
        _weigh_unit(arrays, u, lane)
    while True:
        piece = atomic_add(place + PIECE * 8, 1)
        if piece >= desk[TASKS] + desk[UNITS]:
            return
        _do_piece(arrays, piece, place, geometry, shared, lane)


@jit
def open_desk(desk: Any, seq: int) -> None:
    """Let all threads at the desk, which is laid out."""
    fence()
    desk[SEQ] = seq
    fence()
    if desk[SLEEPERS] != 0:
        futex_wake(desk.ctypes.data + SEQ * 8)


@jit
def close_desk(desk: Any) -> None:
    """Wait until every task is done, and no thread is at the desk any more."""
    fence()
    while desk[LEFT] > 0:
        sched_yield()
        fence()
    desk[SEQ] = 0
    fence()
    while desk[ACTIVE] > 0:
        sched_yield()
        fence()


@jit
def follow(desk: Any, geometry: Any, shared: Any, lane: Any, spin_ns: int, until_ns: int, timeout: Any) -> None:
    """Do units of every message that is opened until ``until_ns``; yields for ``spin_ns``, then sleeps."""
    place = desk.ctypes.data
    quiet_since = read_clock_ns()
    last = np.int64(0)
    while True:
        fence()
        seq = desk[SEQ]
        now = read_clock_ns()
        if seq != 0 and seq != last:
            atomic_add(place + ACTIVE * 8, 1)
            fence()
            if desk[SEQ] == seq:
                do_units(desk, geometry, shared, lane)
            atomic_add(place + ACTIVE * 8, -1)
            last = seq
            quiet_since = read_clock_ns()
            continue
        if now > until_ns:
            return
        if now - quiet_since < spin_ns:
            sched_yield()
            continue
        atomic_add(place + SLEEPERS * 8, 1)
        fence()
        if desk[SEQ] == seq:
            # The word's lower half; a message that is over is never the number of the next one.
            futex_wait(place + SEQ * 8, np.int32(seq), timeout.ctypes.data)
        atomic_add(place + SLEEPERS * 8, -1)
