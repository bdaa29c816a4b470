# SPDX-License-Identifier: Apache-2.0
"""What the threads of an actor work on (workers/units.py): the desk's arrays as compiled code sees them, and the memory
that each thread has for itself."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.choosing import BINS, ChoiceScratch, choice_scratch
from vllm_retrieval_attn.index.elsewhere import Copies, copies
from vllm_retrieval_attn.index.native import pointer_to
from vllm_retrieval_attn.index.rows import Running, Scratch, jit, running, scratch
from vllm_retrieval_attn.index.search import MOST, SearchScratch, search_scratch
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.workers.desk import ARRAYS_AT, TASK_FIELDS, TASKS, UNITS


class LaneMemory(NamedTuple):
    """What one thread works in.

    Attributes:
        work, choice, run, search: see index/. out, lse: (g, d), (g,). held: for rows that lie elsewhere.
    """

    work: Scratch
    choice: ChoiceScratch
    run: Running
    search: SearchScratch
    out: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    held: Copies


class Arrays(NamedTuple):
    """The desk's arrays, see Desk: tasks; of these, taus asked for and raised; units; of tasks, scaled queries, queries
    in the space of the codes, what its centre adds, thresholds, and partial results over what lies beyond their
    indexes, (tasks, g, d + 2); of units, partial results (units, g, d + 2), and the rest as in Found, but for
    ``shifts``."""

    tasks: Any
    taus: Any
    raised: Any
    units: Any
    queries: Any
    turned: Any
    shifts: Any
    thresholds: Any
    tails: Any
    parts: Any
    scores: Any
    ids: Any
    starts: Any
    floors: Any
    firsts: Any
    sizes: Any
    tops: Any
    sums: Any
    rests: Any
    shares: Any
    counts: Any
    rest: Any
    bins: Any
    masses: Any
    below: Any


def lane_memory(layout: Layout, candidates: int) -> LaneMemory:
    """Memory of one thread; what is not used is not touched."""
    shape = (layout.group, layout.dim)
    return LaneMemory(
        scratch(shape[0]),
        choice_scratch(SHARD_TOKENS),
        running(*shape),
        search_scratch(*shape, candidates),
        np.zeros(shape, np.float32),
        np.zeros(layout.group, np.float32),
        copies(layout.dim, layout.dtype_code),
    )


@jit
def arrays_of(desk: Any, geometry: Any) -> Any:
    """The arrays whose places ``desk`` tells."""
    tasks, units, g, d, at = desk[TASKS], desk[UNITS], geometry.group, geometry.dim, ARRAYS_AT
    return Arrays(
        numba.carray(pointer_to(desk[at]), (tasks, TASK_FIELDS), np.int64),
        numba.carray(pointer_to(desk[at + 1]), (tasks,), np.float64),
        numba.carray(pointer_to(desk[at + 2]), (tasks,), np.float64),
        numba.carray(pointer_to(desk[at + 3]), (units, 2), np.int64),
        numba.carray(pointer_to(desk[at + 4]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[at + 5]), (tasks, g, d), np.float32),
        numba.carray(pointer_to(desk[at + 6]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[at + 7]), (tasks, g), np.float32),
        numba.carray(pointer_to(desk[at + 8]), (tasks, g, d + 2), np.float32),
        numba.carray(pointer_to(desk[at + 9]), (units, g, d + 2), np.float32),
        numba.carray(pointer_to(desk[at + 10]), (units, g * MOST), np.float32),
        numba.carray(pointer_to(desk[at + 11]), (units, g * MOST), np.int32),
        numba.carray(pointer_to(desk[at + 12]), (units, g + 1), np.int64),
        numba.carray(pointer_to(desk[at + 13]), (units, g), np.float32),
        numba.carray(pointer_to(desk[at + 14]), (units,), np.int64),
        numba.carray(pointer_to(desk[at + 15]), (units,), np.int64),
        numba.carray(pointer_to(desk[at + 16]), (units, g), np.float32),
        numba.carray(pointer_to(desk[at + 17]), (units, g), np.float64),
        numba.carray(pointer_to(desk[at + 18]), (units, g), np.float32),
        numba.carray(pointer_to(desk[at + 19]), (units, g), np.float32),
        numba.carray(pointer_to(desk[at + 20]), (units,), np.int64),
        numba.carray(pointer_to(desk[at + 21]), (units,), np.float32),
        numba.carray(pointer_to(desk[at + 22]), (units, BINS), np.int64),
        numba.carray(pointer_to(desk[at + 23]), (units, BINS), np.float64),
        numba.carray(pointer_to(desk[at + 24]), (units,), np.float64),
    )
