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
from vllm_retrieval_attn.index.head import NO_ADDRESSES, HeadIndex
from vllm_retrieval_attn.index.native import Native, native
from vllm_retrieval_attn.index.rows import Memory, memory_of
from vllm_retrieval_attn.index.search import MOST
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
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
from vllm_retrieval_attn.workers.indexes import Indexes, RequestGone

logger = logging.getLogger("vllm.retrieval.workers")

FAILED = np.float32(np.inf)
"""What a task that could not be done writes in place of its result."""
EXACT_PIECE = 4096
"""Rows attended to exactly in one unit."""

# int64 numbers of a task
(
    TASK_ROW, TASK_HEAD, TASK_LAYER, TASK_TOKENS, TASK_INDEXED, TASK_TABLE, TASK_BASE, TASK_LIMIT, TASK_POSITION,
    TASK_SEED, TASK_PROBED, TASK_FIRST, TASK_UNITS, TASK_DONE, TASK_FAILED, TASK_OBJECTS, TASK_SAMPLES, TASK_MEANS,
    TASK_DEVIATIONS, TASK_TURN, TASK_CENTRE, TASK_COUNT, TASK_STATE, TASK_FOLDED,
) = range(24)  # fmt: skip
"""Row of the message, KV head and layer; host tokens, and how many are indexed; page table; element of a page where the
head's rows begin; rows to read; position and the request's seed; whether its choice is kept; first unit and their
number; how many are done; whether it failed; addresses, as HeadIndex has them; rows chosen; how far it is; pieces of
chosen rows that are done."""
OPEN, CHOSEN, OVER = range(3)
"""Rows not chosen yet; chosen, so that their pieces can be done; nothing more to do."""
FOLDED = 9
"""Pieces of a task's chosen rows; the last of them is what lies beyond its index."""
TASK_FIELDS = 24
UNIT_TASK, UNIT_NUMBER = 0, 1

# int64 numbers of the desk: counters in lines of their own, then addresses and sizes of the arrays
NEXT, ACTIVE, LEFT, CODES, ROWS, SEQ, SLEEPERS, TURN, UNTURNED, PIECE = (8 * number for number in range(10))
"""Next unit; threads that may look at the arrays; tasks left; keys scored and rows read; the message that is open, 0:
none; threads that sleep until there is one; next query head of a task to be turned, and how many are not yet;
next piece of chosen rows."""
TASKS, UNITS, TASKS_AT, TAUS_AT, UNITS_AT, QUERIES_AT, TURNED_AT, SHIFTS_AT, THRESHOLDS_AT = range(80, 89)
CHOSEN_AT, LOG_PI_AT, FOLDED_AT, SCORES_AT, IDS_AT, STARTS_AT, FLOORS_AT, FIRSTS_AT, SIZES_AT, PARTS_AT = range(89, 99)
DESK_NUMBERS = 104


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
    most_chosen: int
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
            layout.page_elements, layout.first_head, np.float32(scale), candidates,
            layout.most_chosen, native(),
        )  # fmt: skip
        self.shared = Shared(
            indexes.source, memory_of(views.queries, layout.dtype_code), views.tables, views.outside, views.partials,
            views.read, views.chosen,
        )  # fmt: skip
        self._held: list[npt.NDArray[Any]] = []
        self._searched: list[HeadIndex] = []
        self._room = (0, 0)
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
        self._held = [
            self._tasks, self._taus, self._units,
            *np.zeros((2, tasks, group, dim), np.float32), *np.zeros((2, tasks, group), np.float32),
            np.zeros((tasks, self._layout.most_chosen), np.int64),
            np.zeros((tasks, self._layout.most_chosen), np.float32),
            np.zeros((tasks, FOLDED, group, dim + 2), np.float32),
            np.zeros((units, group * MOST), np.float32), np.zeros((units, group * MOST), np.int32),
            np.zeros((units, group + 1), np.int64), np.zeros((units, group), np.float32),
            *np.zeros((2, units), np.int64),
            np.zeros((units, group, dim + 2), np.float32),
        ]  # fmt: skip
        self.numbers[TASKS_AT : TASKS_AT + len(self._held)] = [array.ctypes.data for array in self._held]

    def lay_out(self) -> None:
        """Lay the message in the shared file out, its indexes extended as far as it wants them. No thread may be at
        the desk."""
        views, heads = self._views, self._indexes.heads
        rows = views.rows[: int(views.header[MSG_ROWS])].copy()
        indexed, tokens = rows[:, ROW_INDEXED], rows[:, ROW_TOKENS]
        units = np.where(indexed > 0, -(-indexed // SHARD_TOKENS), np.maximum(1, -(-tokens // EXACT_PIECE)))
        self._reserve(len(rows) * len(heads), int(units.sum()) * len(heads))
        layer, probe = int(views.header[MSG_LAYER]), int(views.header[MSG_PROBE])
        counts = np.repeat(units, len(heads))
        firsts = np.cumsum(counts) - counts
        task, first = len(counts), int(counts.sum())
        laid = [
            self._task(row, head, layer, numbers, row == probe)
            for row, numbers in enumerate(rows.tolist())
            for head in heads
        ]
        if laid:
            self._tasks[:task] = laid
        self._tasks[:task, TASK_FIRST], self._tasks[:task, TASK_UNITS] = firsts, counts
        self._taus[:task] = np.repeat(rows[:, ROW_TAU] * TAU_UNIT, len(heads))
        of = np.repeat(np.arange(task), counts)
        self._units[:first, UNIT_TASK], self._units[:first, UNIT_NUMBER] = of, np.arange(first) - firsts[of]
        self.numbers[TASKS], self.numbers[UNITS] = task, first
        self.numbers[NEXT] = self.numbers[CODES] = self.numbers[ROWS] = 0
        self.numbers[TURN] = self.numbers[PIECE] = 0
        self.numbers[LEFT], self.numbers[UNTURNED] = task, task * self._layout.group

    def clear(self) -> None:
        """The message is over. Until then its indexes stay in memory, also where their requests have been given up: the
        threads at the desk know them by their addresses alone."""
        self._searched.clear()

    def _task(self, row: int, head: int, layer: int, numbers: list[int], probed: bool) -> tuple[int, ...]:
        """A task but for its units."""
        addresses, failed = NO_ADDRESSES, False
        if numbers[ROW_INDEXED]:
            key = (numbers[ROW_TABLE], layer, head)
            try:
                index = self._indexes.ready(key, numbers[ROW_GENERATION], numbers[ROW_INDEXED])
                if index.size != numbers[ROW_INDEXED]:
                    raise RuntimeError(f"the index of {key} has {index.size} keys, not {numbers[ROW_INDEXED]}")
                self._searched.append(index)
                addresses = index.addresses
            except RequestGone:
                failed = True
            except Exception:  # the request of this row ends with an error, those of the others go on
                logger.exception("retrieval: the index for a row could not be made")
                failed = True
        return (
            row, head, layer, numbers[ROW_TOKENS], numbers[ROW_INDEXED], numbers[ROW_TABLE],
            self._indexes.row_base(layer, head), numbers[ROW_LIMIT], numbers[ROW_POSITION], numbers[ROW_SEED],
            int(probed), 0, 0, 0, int(failed), *addresses, 0, OPEN, 0,
        )  # fmt: skip
