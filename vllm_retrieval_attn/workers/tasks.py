# SPDX-License-Identifier: Apache-2.0
"""What the threads of an actor work on (workers/units.py): the desk's arrays as compiled code sees them, and the memory
that each thread has for itself."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.choosing import ChoiceScratch, choice_scratch
from vllm_retrieval_attn.index.elsewhere import Copies, copies
from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import Running, Scratch, jit, running, scratch
from vllm_retrieval_attn.index.search import MOST
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.workers.desk import (
    CHOSEN_AT,
    FIRSTS_AT,
    FLOORS_AT,
    FOLDED,
    FOLDED_AT,
    IDS_AT,
    LOG_PI_AT,
    PARTS_AT,
    QUERIES_AT,
    SCORES_AT,
    SHIFTS_AT,
    SIZES_AT,
    STARTS_AT,
    TASK_FIELDS,
    TASKS,
    TASKS_AT,
    TAUS_AT,
    THRESHOLDS_AT,
    TURNED_AT,
    UNITS,
    UNITS_AT,
)


class LaneMemory(NamedTuple):
    """What one thread works in.

    Attributes:
        work, choice, run: see index/. scaled: (g, d + 1) float32 queries in a shard's scale. best: scratch of
            index/search.py's thresholds. out, lse: (g, d), (g,). held: for rows that lie elsewhere.
    """

    work: Scratch
    choice: ChoiceScratch
    run: Running
    scaled: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]
    out: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    held: Copies


class Arrays(NamedTuple):
    """The desk's arrays, see Desk: tasks and units; of tasks, taus, scaled queries, queries in the space of the codes,
    what its centre adds, and thresholds; elements where chosen rows begin and their log pi, (tasks, chosen), and
    partial results over these, (tasks, FOLDED, g, d + 2); of units, candidates as in Found, and partial results
    (units, g, d + 2)."""

    tasks: Any
    taus: Any
    units: Any
    queries: Any
    turned: Any
    shifts: Any
    thresholds: Any
    chosen: Any
    log_pi: Any
    folded: Any
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
        scratch(shape[0]),
        choice_scratch(keys, -(-keys // SHARD_TOKENS), layout.most_chosen),
        running(*shape),
        np.zeros((layout.group, layout.dim + 1), np.float32),
        np.zeros(candidates // 64 + 2, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(layout.group, np.float32),
        copies(layout.dim, layout.dtype_code),
    )


@jit
def arrays_of(desk: Any, geometry: Any) -> Any:
    """The arrays whose places ``desk`` tells."""
    tasks, units, g, d, most = desk[TASKS], desk[UNITS], geometry.group, geometry.dim, geometry.most_chosen
    return Arrays(
        numba.carray(pointer_to(desk[TASKS_AT]), (tasks, TASK_FIELDS), np.int64),
        numba.carray(pointer_to(desk[TAUS_AT]), (tasks,), np.float64),
        numba.carray(pointer_to(desk[UNITS_AT]), (units, 2), np.int64),
        numba.carray(pointer_to(desk[QUERIES_AT]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[TURNED_AT]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[SHIFTS_AT]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[THRESHOLDS_AT]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[CHOSEN_AT]), (tasks, most), np.int64),
        numba.carray(pointer_to(desk[LOG_PI_AT]), (tasks, most), np.float32),
        numba.carray(pointer_to(desk[FOLDED_AT]), (tasks, FOLDED, g, d + 2), np.float32),
        numba.carray(pointer_to(desk[SCORES_AT]), (units, g * MOST), np.float32),
        numba.carray(pointer_to(desk[IDS_AT]), (units, g * MOST), np.int32),
        numba.carray(pointer_to(desk[STARTS_AT]), (units, g + 1), np.int64),
        numba.carray(pointer_to(desk[FLOORS_AT]), (units, g), np.float32),
        numba.carray(pointer_to(desk[FIRSTS_AT]), (units,), np.int64),
        numba.carray(pointer_to(desk[SIZES_AT]), (units,), np.int64),
        numba.carray(pointer_to(desk[PARTS_AT]), (units, g, d + 2), np.float32),
    )
