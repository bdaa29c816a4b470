# SPDX-License-Identifier: Apache-2.0
"""One message's work in an actor, laid out in the actor's own memory for compiled code.

A *task* is a (row, KV head). Its *units* are the shards of its index to search or, where nothing is indexed, pieces of
its rows to attend to exactly. The leading thread of an actor lays them out, the others do them (workers/units.py).
"""

import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.elsewhere import Source
from vllm_retrieval_attn.index.head import NO_ADDRESSES, HeadIndex, found_for
from vllm_retrieval_attn.index.native import Native, native
from vllm_retrieval_attn.index.rows import Memory, memory_of
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.store.layout import (
    MSG_LAYER,
    MSG_PROBE,
    MSG_ROWS,
    MSG_STEP,
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
from vllm_retrieval_attn.workers.indexes import Indexes, RequestGone

logger = logging.getLogger("vllm.retrieval.workers")

FAILED = np.float32(np.inf)
"""What a task that could not be done writes in place of its result."""
EXACT_PIECE = 4096
"""Rows attended to exactly in one unit."""

_FEW = 1024
"""Tokens of a head that the leading thread indexes by itself; where more are missing, it calls the others."""

# int64 numbers of a task
(
    TASK_ROW, TASK_HEAD, TASK_TOKENS, TASK_INDEXED, TASK_TABLE, TASK_LIMIT, TASK_POSITION, TASK_SEED, TASK_FIRST,
    TASK_UNITS,
) = range(10)  # fmt: skip
"""Row of the message and KV head; host tokens, and how many are indexed; page table; rows to read; position and the
request's seed; first unit and their number. The same in all layers of a step."""
(
    TASK_LAYER, TASK_BASE, TASK_PROBED, TASK_FAILED, TASK_OBJECTS, TASK_CODES, TASK_SAMPLES, TASK_MEANS,
    TASK_DEVIATIONS, TASK_TURN, TASK_CENTRE, TASK_DONE, TASK_WEIGHED, TASK_FOLDED, TASK_COUNT, TASK_STATE,
) = range(10, 26)  # fmt: skip
"""Layer; element of a page where the head's rows begin; whether its choice is kept; whether it failed; addresses, as
HeadIndex has them; units that are done, weighed and folded; rows chosen; how far it is."""
TASK_FIELDS = 26
OPEN, JOINED, CHOSEN, OVER = range(4)
"""Not all units are done yet; they are, and can be weighed; tau is known, and rows can be drawn; nothing more to do."""
UNIT_TASK, UNIT_NUMBER = 0, 1

# int64 numbers of the desk: counters in lines of their own, then addresses and sizes of the arrays
NEXT, ACTIVE, LEFT, CODES, ROWS, SEQ, SLEEPERS, TURN, UNTURNED, WEIGH, PIECE = (8 * number for number in range(11))
"""Next unit; threads that may look at the arrays; tasks left; keys scored and rows read; the message that is open, 0:
none; threads that sleep until there is one; next task whose queries are to be turned, and how many are not yet;
next unit to be weighed; next piece of rows: what lies beyond the index of each task, then the units."""
TASKS, UNITS = 88, 89
ARRAYS_AT = 90
"""Addresses of the arrays, in the order of Arrays (workers/tasks.py)."""
DESK_NUMBERS = 128


class Geometry(NamedTuple):
    """Numbers that never change: see Layout; ``page_elements``: from one page to the next. ``native``: addresses
    of Faiss's functions. ``candidates``: about how many keys are asked for, of each query head."""

    group: int
    dim: int
    kv_heads: int
    pages: int
    page_tokens: int
    page_elements: int
    first_head: int
    scale: np.float32
    candidates: int
    native: Native


class Shared(NamedTuple):
    """Views of the shared file, see Views; ``source``, the pages, and ``queries`` as rows of elements."""

    source: Source
    queries: Memory
    tables: npt.NDArray[np.int64]
    outside: npt.NDArray[np.float32]
    partials: npt.NDArray[np.float32]
    read: npt.NDArray[np.int32]
    chosen: npt.NDArray[np.int32]


class Desk:
    """Used by the leading thread of an actor.

    Args:
        layout, views: the shared file of the rank. indexes: of the actor. scale: softmax scale.
        candidates: about how many keys are asked for, of each query head.

    Attributes:
        numbers: (DESK_NUMBERS,) int64. geometry, shared: for compiled code.
    """

    def __init__(self, layout: Layout, views: Views, indexes: Indexes, scale: float, candidates: int) -> None:
        self._layout, self._views, self._indexes = layout, views, indexes
        self.numbers = np.zeros(DESK_NUMBERS, np.int64)
        self.geometry = Geometry(
            layout.group, layout.dim, layout.kv_heads, layout.pages, layout.page_tokens,
            layout.page_elements, layout.first_head, np.float32(scale), candidates, native(),
        )  # fmt: skip
        self.shared = Shared(
            indexes.source, memory_of(views.queries, layout.dtype_code), views.tables, views.outside, views.partials,
            views.read, views.chosen,
        )  # fmt: skip
        self._held: list[npt.NDArray[Any]] = []
        self._laid: bytes | None = None
        self._searched: list[HeadIndex] = []
        self._room = (0, 0)
        self._ahead = (0, 0)
        self._reserve(len(indexes.heads), 64)

    def _reserve(self, tasks: int, units: int) -> None:
        """Make room; what is there before is lost."""
        if tasks <= self._room[0] and units <= self._room[1]:
            return
        tasks, units = (
            1 << (max(n, room) - 1).bit_length() for n, room in zip((tasks, units), self._room, strict=True)
        )
        group, dim = self._layout.group, self._layout.dim
        self._room = tasks, units
        self._tasks = np.zeros((tasks, TASK_FIELDS), np.int64)
        self._taus = np.zeros(tasks)
        self._units = np.zeros((units, 2), np.int64)
        found = found_for(units, group)
        self._held = [
            self._tasks, self._taus, np.zeros(tasks), self._units,
            *np.zeros((2, tasks, group, dim), np.float32), *np.zeros((2, tasks, group), np.float32),
            np.zeros((tasks, group, dim + 2), np.float32), np.zeros((units, group, dim + 2), np.float32),
            *(part for name, part in found._asdict().items() if name != "shifts"),
        ]  # fmt: skip
        self.numbers[ARRAYS_AT : ARRAYS_AT + len(self._held)] = [array.ctypes.data for array in self._held]
        self._laid = None

    def lay_out(self, seq: int) -> None:
        """Lay message ``seq`` in the shared file out, its indexes extended as far as it wants them. No thread may be at
        the desk."""
        header = self._views.header
        step = int(header[MSG_STEP])
        if step and self._ahead == (step, seq):
            return
        layer = seq - step - 1 if step else int(header[MSG_LAYER])
        rows = self._views.rows[: int(header[MSG_ROWS])].copy()
        self._lay(rows if layer >= 0 else rows[:0], layer, int(header[MSG_PROBE]))

    def lay_ahead(self, seq: int) -> None:
        """Lay message ``seq`` out before it comes, if it will be the next layer of a step (MSG_STEP) whose tokens are
        known to have arrived."""
        header = self._views.header
        step = int(header[MSG_STEP])
        layer = seq - step - 1
        self._ahead = (0, 0)
        if not step or not 0 <= layer < self._layout.layers:
            return
        rows = self._views.rows[: int(header[MSG_ROWS])].copy()
        # The engine opens a step before the GPU has come to it: keys of a prompt's last part may still be on their way,
        # until the GPU posts layer 0.
        if layer == 0 and self._is_behind(rows):
            return
        self._lay(rows, layer, int(header[MSG_PROBE]))
        self._ahead = step, seq

    def _is_behind(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether indexes of layer 0 lack tokens of these rows."""
        return any(
            self._indexes.missing((row[ROW_TABLE], 0, head), row[ROW_GENERATION], row[ROW_INDEXED])
            for row in rows.tolist()
            for head in self._indexes.heads
        )

    def _lay(self, rows: npt.NDArray[np.int64], layer: int, probe: int) -> None:
        laid = rows.tobytes()
        if laid != self._laid:
            self._lay_rows(rows)
            self._laid = laid
        tasks = [
            self._of_layer(head, layer, numbers, row == probe)
            for row, numbers in enumerate(rows.tolist())
            for head in self._indexes.heads
        ]
        if tasks:
            self._tasks[: len(tasks), TASK_LAYER:] = tasks
        self.numbers[NEXT] = self.numbers[CODES] = self.numbers[ROWS] = 0
        self.numbers[TURN] = self.numbers[WEIGH] = self.numbers[PIECE] = 0
        self.numbers[LEFT] = self.numbers[UNTURNED] = len(tasks)

    def _lay_rows(self, rows: npt.NDArray[np.int64]) -> None:
        """What is the same in all layers of a step."""
        heads = self._indexes.heads
        indexed, tokens = rows[:, ROW_INDEXED], rows[:, ROW_TOKENS]
        units = np.where(indexed > 0, -(-indexed // SHARD_TOKENS), np.maximum(1, -(-tokens // EXACT_PIECE)))
        counts = np.repeat(units, len(heads))
        task, unit = len(counts), int(counts.sum())
        self._reserve(task, unit)
        firsts = np.cumsum(counts) - counts
        columns = np.repeat(
            rows[:, [ROW_TOKENS, ROW_INDEXED, ROW_TABLE, ROW_LIMIT, ROW_POSITION, ROW_SEED]], len(heads), axis=0
        )
        tasks = self._tasks[:task]
        tasks[:, TASK_ROW], tasks[:, TASK_HEAD] = np.repeat(np.arange(len(rows)), len(heads)), heads * len(rows)
        tasks[:, TASK_TOKENS : TASK_SEED + 1] = columns
        tasks[:, TASK_FIRST], tasks[:, TASK_UNITS] = firsts, counts
        self._taus[:task] = np.repeat(rows[:, ROW_TAU] * TAU_UNIT, len(heads))
        of = np.repeat(np.arange(task), counts)
        self._units[:unit, UNIT_TASK], self._units[:unit, UNIT_NUMBER] = of, np.arange(unit) - firsts[of]
        self.numbers[TASKS], self.numbers[UNITS] = task, unit

    def clear(self) -> None:
        """The message is over. Until then its indexes stay in memory, also where their requests have been given up: the
        threads at the desk know them by their addresses alone."""
        self._searched.clear()

    def _of_layer(self, head: int, layer: int, numbers: list[int], probed: bool) -> tuple[int, ...]:
        """Numbers of a task from TASK_LAYER on."""
        addresses, failed = NO_ADDRESSES, False
        if numbers[ROW_INDEXED]:
            key = (numbers[ROW_TABLE], layer, head)
            generation, indexed = numbers[ROW_GENERATION], numbers[ROW_INDEXED]
            if self._indexes.missing(key, generation, indexed - _FEW):
                self._indexes.want(key[0], generation, indexed)
            try:
                index = self._indexes.ready(key, generation, indexed)
                if index.size != indexed:
                    raise RuntimeError(f"the index of {key} has {index.size} keys, not {indexed}")
                self._searched.append(index)
                addresses = index.addresses
            except RequestGone:
                failed = True
            except Exception:  # the request of this row ends with an error, those of the others go on
                logger.exception("retrieval: the index for a row could not be made")
                failed = True
        base = self._indexes.row_base(layer, head)
        return (layer, base, int(probed), int(failed), *addresses, 0, 0, 0, 0, OPEN)
