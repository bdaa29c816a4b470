"""One message's work in an actor: units that its lanes take one after the other.

A task is a (row, KV head). Its units are the shards of its index to search or, where nothing is indexed, pieces of its
rows to attend to exactly. Whoever does the last unit of a task finishes it: chooses rows among what was found, attends
to them and to what is read anyway, and writes the result. No two threads write the same memory, and the sums of a task
run in one order whoever does what.
"""

import itertools
import logging
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.choosing import ChoiceScratch, Found, choice_scratch, choose
from vllm_retrieval_attn.index.head import MOST, HeadIndex, found_for
from vllm_retrieval_attn.index.rows import (
    Memory,
    Running,
    attend_picked,
    attend_run,
    finish,
    load,
    memory_of,
    running,
    scratch,
)
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.sketch.sampling import seed_of
from vllm_retrieval_attn.sketch.space import Floats
from vllm_retrieval_attn.store.layout import (
    MSG_LAYER,
    MSG_PROBE,
    MSG_ROWS,
    ROW_GENERATION,
    ROW_INDEXED,
    ROW_LIMIT,
    ROW_POSITION,
    ROW_SEED,
    ROW_TABLE,
    ROW_TAU,
    ROW_TOKENS,
    TAU_UNIT,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.indexes import Indexes

logger = logging.getLogger("vllm.retrieval")

FAILED = np.float32(np.inf)
"""What a task that could not be done writes in place of its result."""
EXACT_PIECE = 4096
"""Rows attended to exactly in one unit."""


@dataclass
class Task:
    """A (row, KV head) of a message.

    Attributes:
        row: number in the message. numbers: its fields. queries: (g, d) float32, unscaled.
        units: how many. done: counts them. parts: partial results of exact pieces.
        index, turned, shift, found: of the search, set by the thread that comes first.
    """

    row: int
    head: int
    numbers: npt.NDArray[np.int64]
    queries: Floats
    units: int
    done: "itertools.count[int]" = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[int, Running] = field(default_factory=dict)
    index: HeadIndex | None = None
    turned: Floats | None = None
    shift: Floats | None = None
    found: Found | None = None
    failed: bool = False


class LaneScratch:
    """Memory of one lane. Grows with the longest row it meets."""

    def __init__(self, layout: Layout) -> None:
        self.work = scratch(layout.group, layout.dim)
        self.out = np.empty((layout.group, layout.dim), np.float32)
        self.lse = np.empty(layout.group, np.float32)
        self._most = layout.most_chosen
        self._choice: ChoiceScratch | None = None

    def choice(self, found: Found, keys: int) -> ChoiceScratch:
        """Memory to choose in, for ``keys`` keys."""
        shards, _, k = found.scores.shape
        held = self._choice
        if held is None or len(held.extra) < keys or len(held.rest) < shards or len(held.exp_bits) < k:
            size = 1 << (max(keys, SHARD_TOKENS) - 1).bit_length()
            held = self._choice = choice_scratch(size, -(-size // SHARD_TOKENS), 1 << (k - 1).bit_length(), self._most)
        return held


class Worktop:
    """What all messages of an actor share.

    Args:
        layout, views: the shared file of the rank. indexes: of the actor. scale: softmax scale.
        candidates: best keys asked for, of each query head.
    """

    def __init__(self, layout: Layout, views: Views, indexes: Indexes, scale: float, candidates: int) -> None:
        self.layout, self.views, self.indexes = layout, views, indexes
        self.scale, self.candidates = np.float32(scale), candidates
        self.memory: Memory = indexes.memory
        self._queries = memory_of(views.queries, layout.dtype_code)
        self._spare: list[Found] = []
        self._lock = threading.Lock()
        self._open: Message | None = None

    def message(self, seq: int) -> "Message":
        """The message of that number; the first lane to ask makes it."""
        with self._lock:
            if self._open is None or self._open.seq != seq:
                self._open = Message(self, seq)
            return self._open

    def queries_of(self, row: int, head: int) -> Floats:
        """(g, d) float32 queries of a row of the message."""
        lay = self.layout
        found = np.empty((lay.group, lay.dim), np.float32)
        flat, count = found.reshape(-1), lay.group * lay.dim
        load(self._queries, (row * lay.kv_heads + head) * count, count, flat, flat.view(np.uint32))
        return found

    def take_found(self, shards: int) -> Found:
        """Memory for the candidates of a task; give it back."""
        with self._lock:
            for place, held in enumerate(self._spare):
                if len(held.counts) >= shards:
                    return self._spare.pop(place)
        return found_for(1 << (shards - 1).bit_length(), self.layout.group, MOST)

    def give_found(self, found: Found) -> None:
        with self._lock:
            self._spare.append(found)


class Message:
    """A message and who does what of it.

    Attributes:
        seq: its number. layer: which one.
    """

    def __init__(self, top: Worktop, seq: int) -> None:
        views = top.views
        self.seq, self._top = seq, top
        self.layer = int(views.header[MSG_LAYER])
        self._probe = int(views.header[MSG_PROBE])
        tasks = []
        for row in range(int(views.header[MSG_ROWS])):
            numbers = views.rows[row].copy()
            indexed, tokens = int(numbers[ROW_INDEXED]), int(numbers[ROW_TOKENS])
            units = -(-indexed // SHARD_TOKENS) if indexed else max(1, -(-tokens // EXACT_PIECE))
            tasks += [Task(row, head, numbers, top.queries_of(row, head), units) for head in top.indexes.heads]
        self._units = [(task, number) for task in tasks for number in range(task.units)]
        self._next = itertools.count()

    def serve(self, lane: LaneScratch) -> tuple[int, int]:
        """Do units until none is left; returns keys scored by code and rows read."""
        codes = rows = 0
        while (number := next(self._next)) < len(self._units):
            task, unit = self._units[number]
            try:
                if task.numbers[ROW_INDEXED]:
                    codes += self._search(task, unit)
                else:
                    rows += self._attend_piece(task, unit, lane)
            except Exception:
                self._fail(task)
            if next(task.done) == task.units - 1:
                try:
                    rows += self._finish(task, lane)
                except Exception:
                    self._fail(task)
                if task.failed:
                    self._top.views.partials[task.row, task.head] = FAILED
        return codes, rows

    def _fail(self, task: Task) -> None:
        """The request of this row ends with an error, those of the others go on."""
        if not task.failed:
            logger.exception("retrieval: the search for a row failed")
        task.failed = True

    def _search(self, task: Task, shard: int) -> int:
        with task.lock:
            if task.found is None:
                self._prepare(task)
        assert task.index is not None
        assert task.turned is not None
        assert task.shift is not None
        assert task.found is not None
        task.index.search(shard, task.turned, task.shift, self._top.candidates, task.found)
        return task.index.shards[shard].size

    def _prepare(self, task: Task) -> None:
        numbers = task.numbers
        key = (int(numbers[ROW_TABLE]), self.layer, task.head)
        indexed = int(numbers[ROW_INDEXED])
        task.index = self._top.indexes.ready(key, int(numbers[ROW_GENERATION]), indexed)
        if task.index.size != indexed:
            raise RuntimeError(f"the index of {key} has {task.index.size} keys, {indexed} were asked for")
        task.turned, task.shift = task.index.turn(task.queries)
        task.found = self._top.take_found(task.units)

    def _attend_piece(self, task: Task, piece: int, lane: LaneScratch) -> int:
        run = running(*task.queries.shape)
        first, last = piece * EXACT_PIECE, min(int(task.numbers[ROW_TOKENS]), (piece + 1) * EXACT_PIECE)
        self._attend_exactly(task, first, last, run, lane)
        task.parts[piece] = run
        return last - first

    def _attend_exactly(self, task: Task, first: int, last: int, run: Running, lane: LaneScratch) -> None:
        lay, top = self._top.layout, self._top
        base, slot = top.indexes.row_base(self.layer, task.head), int(task.numbers[ROW_TABLE])
        scaled = task.queries * top.scale
        while first < last:
            offset = first % lay.page_tokens
            count = min(lay.page_tokens - offset, last - first)
            page = int(top.views.tables[slot, first // lay.page_tokens])
            start = page * top.indexes.page_elements + base + offset * lay.row_elements
            attend_run(top.memory, start, count, scaled, run, lane.work)
            first += count

    def _finish(self, task: Task, lane: LaneScratch) -> int:
        """Write the result of a task; returns the rows read for it here."""
        if task.failed:
            return 0
        lay, views, rows = self._top.layout, self._top.views, 0
        if task.numbers[ROW_INDEXED]:
            run = running(*task.queries.shape)
            rows = self._attend_chosen(task, run, lane)
            finish(run, lane.out, lane.lse)
        else:
            parts = [task.parts[piece] for piece in range(task.units)]
            finish(merged(parts), lane.out, lane.lse)
        views.read[task.row, task.head] = rows or int(task.numbers[ROW_TOKENS])
        target = views.partials[task.row, task.head]
        target[: lay.group * lay.dim] = lane.out.reshape(-1)
        target[lay.group * lay.dim :] = lane.lse
        return rows

    def _attend_chosen(self, task: Task, run: Running, lane: LaneScratch) -> int:
        top, numbers, found = self._top, task.numbers, task.found
        lay, indexed, tokens = top.layout, int(numbers[ROW_INDEXED]), int(numbers[ROW_TOKENS])
        assert found is not None
        work = lane.choice(found, indexed)
        outside = top.views.outside[task.row, task.head * lay.group : (task.head + 1) * lay.group]
        seed = seed_of(int(numbers[ROW_SEED]), int(numbers[ROW_POSITION]), self.layer, lay.first_head + task.head)
        count = choose(
            found, task.units, top.scale, outside, int(numbers[ROW_LIMIT]), int(numbers[ROW_TAU]) * TAU_UNIT,
            np.uint64(seed), work,
        )  # fmt: skip
        top.give_found(found)
        if count < 0:
            raise RuntimeError(f"more than {lay.most_chosen} rows are to be read")
        ids = work.ids[:count]
        if task.row == self._probe:
            kept = top.views.chosen[self.layer, task.head]
            kept[0], kept[1 : 1 + count] = count, ids
        pages = top.views.tables[int(numbers[ROW_TABLE])][ids // lay.page_tokens]
        starts = pages * top.indexes.page_elements + ids % lay.page_tokens * lay.row_elements
        starts += top.indexes.row_base(self.layer, task.head)
        attend_picked(top.memory, starts, work.log_pi, count, task.queries * top.scale, run, lane.work)
        self._attend_exactly(task, indexed, tokens, run, lane)
        return count + tokens - indexed


def merged(parts: list[Running]) -> Running:
    """One softmax over the disjoint keys of several, in order."""
    top = np.max([part.top for part in parts], axis=0)
    safe = np.where(np.isfinite(top), top, np.float32(0))
    scales = [np.exp(part.top - safe) for part in parts]
    acc = sum(part.acc * scale[:, None] for part, scale in zip(parts, scales, strict=True))
    total = sum(part.total * scale for part, scale in zip(parts, scales, strict=True))
    return Running(np.asarray(acc), top, np.asarray(total))
