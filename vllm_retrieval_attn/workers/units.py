# SPDX-License-Identifier: Apache-2.0
"""Doing the units of a message (workers/desk.py), by the threads of an actor side by side, without Python's lock.

A thread takes the next unit by an atomic counter. Whoever does the last unit of a task chooses rows among what was
found. When all units are taken, threads take pieces of the chosen rows the same way, and whoever does the last piece of
a task writes its result. No two threads write the same memory, and the sums of a task run in one order whoever does
what.
"""

from typing import Any

import numba
import numpy as np

from vllm_retrieval_attn.index.choosing import Found, choose, seed_of
from vllm_retrieval_attn.index.elsewhere import attend_picked_from, attend_run_from
from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import finish, jit, load
from vllm_retrieval_attn.index.search import product, search_shard, shard_keys, threshold, turn
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.workers.desk import (
    ACTIVE,
    CHOSEN,
    CODES,
    EXACT_PIECE,
    FAILED,
    FOLDED,
    LEFT,
    NEXT,
    OPEN,
    OVER,
    PIECE,
    ROWS,
    SEQ,
    SLEEPERS,
    TASK_BASE,
    TASK_CENTRE,
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
    TASKS,
    TURN,
    UNIT_NUMBER,
    UNIT_TASK,
    UNITS,
    UNTURNED,
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
    """Candidates in units ``[first, last)`` of a task."""
    return Found(
        arrays.scores[first:last], arrays.ids[first:last], arrays.starts[first:last], arrays.floors[first:last],
        arrays.shifts[t], arrays.firsts[first:last], arrays.sizes[first:last],
    )  # fmt: skip


@jit
def _turn(arrays: Any, t: int, i: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Load a query of a task, scaled, turn it into the space of its codes, and find its threshold."""
    task, query = arrays.tasks[t], arrays.queries[t, i]
    g, d = geometry.group, geometry.dim
    start = ((task[TASK_ROW] * geometry.kv_heads + task[TASK_HEAD]) * g + i) * d
    load(shared.queries, start, d, query)
    if task[TASK_INDEXED] > 0 and task[TASK_FAILED] == 0:
        shards = task[TASK_UNITS]
        turned = arrays.turned[t, i]
        turn(numba.carray(pointer_to(task[TASK_TURN]), (d, d), np.float32), query, turned)
        arrays.shifts[t, i] = product(numba.carray(pointer_to(task[TASK_CENTRE]), (d,), np.float32), query)
        samples = numba.carray(pointer_to(task[TASK_SAMPLES]), (shards,), np.int64)
        arrays.thresholds[t, i] = threshold(samples, task[TASK_INDEXED], geometry.candidates, turned, lane.best)
    for j in range(d):
        query[j] *= geometry.scale


@jit
def _search(arrays: Any, u: int, t: int, geometry: Any, lane: Any) -> int:
    """Candidates of one shard; returns its keys."""
    d = geometry.dim
    task, s = arrays.tasks[t], arrays.units[u, UNIT_NUMBER]
    shards = task[TASK_UNITS]
    mean = numba.carray(pointer_to(task[TASK_MEANS]), (shards, d), np.float32)[s]
    deviation = numba.carray(pointer_to(task[TASK_DEVIATIONS]), (shards, d), np.float32)[s]
    index = numba.carray(pointer_to(task[TASK_OBJECTS]), (shards,), np.int64)[s]
    size = shard_keys(s, task[TASK_INDEXED])
    arrays.firsts[u], arrays.sizes[u] = s * SHARD_TOKENS, size
    found = _found(arrays, t, u, u + 1)
    search_shard(geometry.native, index, mean, deviation, arrays.turned[t], arrays.thresholds[t], lane.scaled, 0, found)
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
def _clear(run: Any) -> None:
    run.acc[:] = 0.0
    run.top[:] = -np.inf
    run.total[:] = 0.0


@jit
def _attend_piece(arrays: Any, u: int, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    task = arrays.tasks[t]
    first = arrays.units[u, UNIT_NUMBER] * EXACT_PIECE
    last = min(first + EXACT_PIECE, task[TASK_TOKENS])
    _clear(lane.run)
    count = _attend_exactly(task, first, last, arrays.queries[t], geometry, shared, lane)
    _keep(lane.run, arrays.parts[u])
    return count


@jit
def _keep(run: Any, part: Any) -> None:
    """Write a running softmax into a partial result (g, d + 2)."""
    d = run.acc.shape[1]
    part[:, :d] = run.acc
    part[:, d] = run.top
    part[:, d + 1] = run.total


@jit
def _merge(parts: Any, run: Any) -> None:
    """One softmax over partial results (n, g, d + 2), in order."""
    _clear(run)
    n, g, d = len(parts), parts.shape[1], run.acc.shape[1]
    for u in range(n):
        part = parts[u]
        for i in range(g):
            if part[i, d + 1] == 0.0:
                continue
            top = max(run.top[i], part[i, d])
            old, new = np.exp(run.top[i] - top), np.exp(part[i, d] - top)
            for j in range(d):
                run.acc[i, j] = run.acc[i, j] * old + part[i, j] * new
            run.total[i] = run.total[i] * old + part[i, d + 1] * new
            run.top[i] = top


@jit
def _choose(arrays: Any, t: int, geometry: Any, shared: Any, lane: Any) -> bool:
    """Choose rows of a task and find where they lie; False on failure."""
    task, g = arrays.tasks[t], geometry.group
    first, shards, head = task[TASK_FIRST], task[TASK_UNITS], task[TASK_HEAD]
    found = _found(arrays, t, first, first + shards)
    outside = shared.outside[task[TASK_ROW], head * g : (head + 1) * g]
    seed = seed_of(task[TASK_SEED], task[TASK_POSITION], task[TASK_LAYER], geometry.first_head + head)
    count = choose(found, shards, geometry.scale, outside, task[TASK_LIMIT], arrays.taus[t], seed, lane.choice)
    if count < 0:
        return False
    ids, table = lane.choice.ids, shared.tables[task[TASK_TABLE]]
    starts, log_pi = arrays.chosen[t], arrays.log_pi[t]
    for n in range(count):
        page = table[ids[n] // geometry.page_tokens]
        if page < 0 or page >= geometry.pages:
            return False
        offset = ids[n] % geometry.page_tokens
        starts[n] = page * geometry.page_elements + task[TASK_BASE] + offset * 2 * geometry.dim
        log_pi[n] = lane.choice.log_pi[n]
    task[TASK_COUNT] = count
    if task[TASK_PROBED]:
        kept = shared.chosen[task[TASK_LAYER], head]
        kept[0] = count
        for n in range(count):
            kept[1 + n] = ids[n]
    return True


@jit
def _fold(arrays: Any, t: int, piece: int, geometry: Any, shared: Any, lane: Any) -> int:
    """Attend to one piece of a task's chosen rows, the last piece: to those beyond its index; returns how many, -1
    where they can not be read."""
    task, queries = arrays.tasks[t], arrays.queries[t]
    _clear(lane.run)
    if piece == FOLDED - 1:
        count = _attend_exactly(task, task[TASK_INDEXED], task[TASK_TOKENS], queries, geometry, shared, lane)
    else:
        first, last = task[TASK_COUNT] * piece // (FOLDED - 1), task[TASK_COUNT] * (piece + 1) // (FOLDED - 1)
        count = last - first
        starts, log_pi = arrays.chosen[t, first:last], arrays.log_pi[t, first:last]
        if not attend_picked_from(shared.source, starts, log_pi, count, queries, lane.run, lane.work, lane.held):
            return -1
    _keep(lane.run, arrays.folded[t, piece])
    return count


@jit
def _finish(task: Any, parts: Any, rows: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Write the result of a task."""
    g, d = geometry.group, geometry.dim
    target = shared.partials[task[TASK_ROW], task[TASK_HEAD]]
    if task[TASK_FAILED] != 0:
        target[:] = FAILED
        return
    _merge(parts, lane.run)
    finish(lane.run, lane.out, lane.lse)
    for i in range(g):
        for j in range(d):
            target[i * d + j] = lane.out[i, j]
        target[g * d + i] = lane.lse[i]
    shared.read[task[TASK_ROW], task[TASK_HEAD]] = rows


@jit
def _do_unit(arrays: Any, u: int, place: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Search a shard, or attend to a piece of a task without an index; whoever does the last unit of a task chooses its
    rows, or finishes it."""
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
    if atomic_add(task.ctypes.data + TASK_DONE * 8, 1) < task[TASK_UNITS] - 1:
        return
    if task[TASK_INDEXED] > 0 and task[TASK_FAILED] == 0:
        if _choose(arrays, t, geometry, shared, lane):
            fence()
            task[TASK_STATE] = CHOSEN
            return
        task[TASK_FAILED] = 1
    parts = arrays.parts[task[TASK_FIRST] : task[TASK_FIRST] + task[TASK_UNITS]]
    _finish(task, parts, task[TASK_TOKENS], geometry, shared, lane)
    fence()
    task[TASK_STATE] = OVER
    atomic_add(place + LEFT * 8, -1)


@jit
def _do_piece(arrays: Any, t: int, piece: int, place: int, geometry: Any, shared: Any, lane: Any) -> None:
    """Attend to a piece of a task's chosen rows once these are known; whoever does the last one finishes the task."""
    task = arrays.tasks[t]
    # All units are taken by now, so somebody is at it, and does not wait for anything.
    while task[TASK_STATE] == OPEN:
        sched_yield()
        fence()
    if task[TASK_STATE] == OVER:
        return
    rows = _fold(arrays, t, piece, geometry, shared, lane)
    if rows < 0:
        task[TASK_FAILED] = 1
    else:
        atomic_add(place + ROWS * 8, rows)
    if atomic_add(task.ctypes.data + TASK_FOLDED * 8, 1) == FOLDED - 1:
        read = task[TASK_COUNT] + task[TASK_TOKENS] - task[TASK_INDEXED]
        _finish(task, arrays.folded[t], read, geometry, shared, lane)
        atomic_add(place + LEFT * 8, -1)


@jit
def do_units(desk: Any, geometry: Any, shared: Any, lane: Any) -> None:
    """Do units of the open message until none is left."""
    arrays = arrays_of(desk, geometry)
    place = desk.ctypes.data
    while True:
        number = atomic_add(place + TURN * 8, 1)
        if number >= desk[TASKS] * geometry.group:
            break
        _turn(arrays, number // geometry.group, number % geometry.group, geometry, shared, lane)
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
        number = atomic_add(place + PIECE * 8, 1)
        if number >= desk[TASKS] * FOLDED:
            return
        _do_piece(arrays, number // FOLDED, number % FOLDED, place, geometry, shared, lane)


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
