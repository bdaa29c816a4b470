"""Doing the units of a message (workers/desk.py), by the threads of an actor side by side, without Python's lock.

A thread takes the next unit by an atomic counter. Whoever does the last unit of a task finishes it: chooses rows among
what was found, attends to them and to what is read anyway, and writes the result. No two threads write the same memory,
and the sums of a task run in one order whoever does what.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.choosing import ChoiceScratch, Found, choice_scratch, choose, seed_of
from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import (
    Running,
    Scratch,
    attend_picked,
    attend_run,
    finish,
    jit,
    load,
    running,
    scratch,
)
from vllm_retrieval_attn.index.search import MOST, product, search_shard, shard_keys, threshold, turn
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.workers.desk import (
    ACTIVE,
    CODES,
    EXACT_PIECE,
    FAILED,
    FIRSTS_AT,
    FLOORS_AT,
    IDS_AT,
    LEFT,
    NEXT,
    PARTS_AT,
    QUERIES_AT,
    ROWS,
    SCORES_AT,
    SEQ,
    SHIFTS_AT,
    SIZES_AT,
    SLEEPERS,
    STARTS_AT,
    TASK_BASE,
    TASK_CENTRE,
    TASK_DEVIATIONS,
    TASK_DONE,
    TASK_FAILED,
    TASK_FIELDS,
    TASK_FIRST,
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
    TASK_TABLE,
    TASK_TOKENS,
    TASK_TURN,
    TASK_UNITS,
    TASKS,
    TASKS_AT,
    TAUS_AT,
    THRESHOLDS_AT,
    TURN,
    TURNED_AT,
    UNIT_NUMBER,
    UNIT_TASK,
    UNITS,
    UNITS_AT,
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


class LaneMemory(NamedTuple):
    """What one thread works in.

    Attributes:
        work, choice, run: see index/. scaled: (g, d + 1) float32 queries in a shard's scale. best: scratch of
            index/search.py's thresholds. out, lse: (g, d), (g,).
        starts: (chosen,) int64.
    """

    work: Scratch
    choice: ChoiceScratch
    run: Running
    scaled: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]
    out: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]


class Arrays(NamedTuple):
    """The desk's arrays, see Desk: tasks and units; of tasks, taus, scaled queries, queries in the space of the codes,
    what its centre adds, and thresholds; of units, candidates as in Found, and partial results (units, g, d + 2)."""

    tasks: Any
    taus: Any
    units: Any
    queries: Any
    turned: Any
    shifts: Any
    thresholds: Any
    scores: Any
    ids: Any
    starts: Any
    floors: Any
    firsts: Any
    sizes: Any
    parts: Any


def lane_memory(layout: Layout, candidates: int) -> LaneMemory:
    """Memory for the longest row there can be; what is not used is not touched."""
    keys = layout.table_pages * layout.page_tokens
    shape = (layout.group, layout.dim)
    return LaneMemory(
        scratch(*shape),
        choice_scratch(keys, -(-keys // SHARD_TOKENS), MOST, layout.most_chosen),
        running(*shape),
        np.zeros((layout.group, layout.dim + 1), np.float32),
        np.zeros(candidates // 64 + 2, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(layout.group, np.float32),
        np.zeros(layout.most_chosen, np.int64),
    )


@jit
def _arrays(desk: Any, geometry: Any) -> Any:
    tasks, units, g, d = desk[TASKS], desk[UNITS], geometry.group, geometry.dim
    return Arrays(
        numba.carray(pointer_to(desk[TASKS_AT]), (tasks, TASK_FIELDS), np.int64),
        numba.carray(pointer_to(desk[TAUS_AT]), (tasks,), np.float64),
        numba.carray(pointer_to(desk[UNITS_AT]), (units, 2), np.int64),
        numba.carray(pointer_to(desk[QUERIES_AT]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[TURNED_AT]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[SHIFTS_AT]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[THRESHOLDS_AT]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[SCORES_AT]), (units, g * MOST), np.float32),
        numba.carray(pointer_to(desk[IDS_AT]), (units, g * MOST), np.int32),
        numba.carray(pointer_to(desk[STARTS_AT]), (units, g + 1), np.int64),
        numba.carray(pointer_to(desk[FLOORS_AT]), (units, g), np.float32),
        numba.carray(pointer_to(desk[FIRSTS_AT]), (units,), np.int64),
        numba.carray(pointer_to(desk[SIZES_AT]), (units,), np.int64),
        numba.carray(pointer_to(desk[PARTS_AT]), (units, g, d + 2), np.float32),
    )


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
    load(shared.queries, start, d, query, query.view(np.uint32))
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
    """Fold rows ``[first, last)`` of a task into the lane's softmax; returns how many, -1 where they lie nowhere."""
    table = shared.tables[task[TASK_TABLE]]
    at = first
    while at < last:
        offset = at % geometry.page_tokens
        count = min(geometry.page_tokens - offset, last - at)
        page = table[at // geometry.page_tokens]
        if page < 0 or page >= geometry.pages:
            return -1
        start = page * geometry.page_elements + task[TASK_BASE] + offset * 2 * geometry.dim
        attend_run(shared.memory, start, count, queries, lane.run, lane.work)
        at += count
    return last - first


@jit
def _clear(run: Any) -> None:
    run.acc[:] = 0.0
    run.top[:] = -np.inf
    run.total[:] = 0.0


@jit
def _attend_piece(arrays: Any, u: int, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    task, d = arrays.tasks[t], geometry.dim
    first = arrays.units[u, UNIT_NUMBER] * EXACT_PIECE
    last = min(first + EXACT_PIECE, task[TASK_TOKENS])
    _clear(lane.run)
    count = _attend_exactly(task, first, last, arrays.queries[t], geometry, shared, lane)
    part = arrays.parts[u]
    part[:, :d] = lane.run.acc
    part[:, d] = lane.run.top
    part[:, d + 1] = lane.run.total
    return count


@jit
def _merge_pieces(arrays: Any, t: int, geometry: Any, lane: Any) -> None:
    """One softmax over the pieces of a task, in order."""
    task, run, d = arrays.tasks[t], lane.run, geometry.dim
    _clear(run)
    for u in range(task[TASK_FIRST], task[TASK_FIRST] + task[TASK_UNITS]):
        part = arrays.parts[u]
        for i in range(geometry.group):
            if part[i, d + 1] == 0.0:
                continue
            top = max(run.top[i], part[i, d])
            old, new = np.exp(run.top[i] - top), np.exp(part[i, d] - top)
            for j in range(d):
                run.acc[i, j] = run.acc[i, j] * old + part[i, j] * new
            run.total[i] = run.total[i] * old + part[i, d + 1] * new
            run.top[i] = top


@jit
def _attend_chosen(arrays: Any, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    """Choose rows of a task and attend to them, and to those beyond its index; returns how many, -1 on failure."""
    task, queries, g = arrays.tasks[t], arrays.queries[t], geometry.group
    first, shards = task[TASK_FIRST], task[TASK_UNITS]
    found = _found(arrays, t, first, first + shards)
    head = task[TASK_HEAD]
    outside = shared.outside[task[TASK_ROW], head * g : (head + 1) * g]
    seed = seed_of(task[TASK_SEED], task[TASK_POSITION], task[TASK_LAYER], geometry.first_head + head)
    count = choose(found, shards, geometry.scale, outside, task[TASK_LIMIT], arrays.taus[t], seed, lane.choice)
    if count < 0:
        return -1
    ids, table = lane.choice.ids, shared.tables[task[TASK_TABLE]]
    for n in range(count):
        page = table[ids[n] // geometry.page_tokens]
        if page < 0 or page >= geometry.pages:
            return -1
        offset = ids[n] % geometry.page_tokens
        lane.starts[n] = page * geometry.page_elements + task[TASK_BASE] + offset * 2 * geometry.dim
    if task[TASK_PROBED]:
        kept = shared.chosen[task[TASK_LAYER], head]
        kept[0] = count
        for n in range(count):
            kept[1 + n] = ids[n]
    _clear(lane.run)
    attend_picked(shared.memory, lane.starts, lane.choice.log_pi, count, queries, lane.run, lane.work)
    more = _attend_exactly(task, task[TASK_INDEXED], task[TASK_TOKENS], queries, geometry, shared, lane)
    return -1 if more < 0 else count + more


@jit
def _finish(arrays: Any, t: int, geometry: Any, shared: Any, lane: Any) -> int:
    """Write the result of a task; returns the rows read for it here."""
    task, g, d = arrays.tasks[t], geometry.group, geometry.dim
    rows = 0
    target = shared.partials[task[TASK_ROW], task[TASK_HEAD]]
    if task[TASK_FAILED] == 0 and task[TASK_INDEXED] > 0:
        rows = _attend_chosen(arrays, t, geometry, shared, lane)
    elif task[TASK_FAILED] == 0:
        _merge_pieces(arrays, t, geometry, lane)
    if rows < 0 or task[TASK_FAILED] != 0:
        target[:] = FAILED
        return 0
    finish(lane.run, lane.out, lane.lse)
    for i in range(g):
        for j in range(d):
            target[i * d + j] = lane.out[i, j]
        target[g * d + i] = lane.lse[i]
    shared.read[task[TASK_ROW], task[TASK_HEAD]] = rows if task[TASK_INDEXED] > 0 else task[TASK_TOKENS]
    return rows


@jit
def do_units(desk: Any, geometry: Any, shared: Any, lane: Any) -> None:
    """Do units of the open message until none is left."""
    arrays = _arrays(desk, geometry)
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
            return
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
        if atomic_add(task.ctypes.data + TASK_DONE * 8, 1) == task[TASK_UNITS] - 1:
            atomic_add(place + ROWS * 8, _finish(arrays, t, geometry, shared, lane))
            atomic_add(place + LEFT * 8, -1)


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
