# SPDX-License-Identifier: Apache-2.0
"""The vLLM worker's side of the ring: post the rows of a layer, wait, take the results."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    ACTOR_DONE,
    MSG_LAYER,
    MSG_PROBE,
    MSG_ROWS,
    MSG_STEP,
    STAT_CODES,
    STAT_NS,
    STAT_ROWS,
    WORD_AWAKE,
    WORD_SEQ,
    WORD_STOP,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.desk import FAILED
from vllm_retrieval_attn.workers.signals import await_actors, raise_seq

_SLICE_NS = 20_000_000
"""How long to wait for an answer before looking whether the actors still live."""

_MOST_SEQ = 0x3FFFFFFF


class WorkersLate(RuntimeError):
    """The CPU workers are gone, or did not answer in time."""


class RingClient:
    """Posts messages and collects answers; used by one thread.

    Args:
        layout, views: the shared file of the rank.
        spin_ns: how long to yield before sleeping. limit_s: how long to wait for an answer.
        alive: asked every 20 ms of waiting whether the actors live.
    """

    def __init__(self, layout: Layout, views: Views, spin_ns: int, limit_s: float, alive: Callable[[], bool]) -> None:
        self._layout, self._views = layout, views
        self._spin_ns, self._limit_s, self._alive = spin_ns, limit_s, alive
        self._timeout = np.array((0, 20_000_000), np.int64)
        self._seq = int(views.words[WORD_SEQ])
        self._address = views.words.ctypes.data

    def post(self, layer: int, rows: npt.NDArray[np.int64], probe: int = -1) -> None:
        """Send a layer's rows; ``views.queries`` and ``views.outside`` must already hold theirs, in the same order.

        Args:
            layer: index of the layer within the arena.
            rows: (n, ROW_FIELDS) int64, see store/layout.py. probe: number of the row whose choice is to be kept.

        Raises:
            WorkersLate: they are still at an earlier message, which would write into the answer to this one.
        """
        if not self.idle():
            raise WorkersLate("CPU workers are still at an earlier message")
        header = self._views.header
        header[MSG_LAYER], header[MSG_PROBE], header[MSG_STEP] = layer, probe, 0
        self._lay(rows)
        self._raise()

    def open_step(self, rows: npt.NDArray[np.int64]) -> int:
        """Announce a step whose messages the GPU posts, those of all layers in order with the same rows: as
        WORD_SEQ, the numbers that follow the one returned. Workers get ready for the first.

        Args:
            rows: (n, ROW_FIELDS) int64, as for :meth:`post`.

        Raises:
            WorkersLate: they are still at an earlier message.
        """
        if not self.idle():
            raise WorkersLate("CPU workers are still at an earlier message")
        views = self._views
        if self._seq + self._layout.layers + 1 > _MOST_SEQ:
            self._seq = 0
        views.header[MSG_STEP], views.header[MSG_PROBE] = self._seq + 1, -1
        self._lay(rows)
        views.words[WORD_AWAKE] = 1
        self._raise()
        return self._seq

    def close_step(self) -> None:
        """The GPU is done with the step. Actors that come back, or are late, find an empty message."""
        views = self._views
        self._seq = int(views.words[WORD_SEQ])
        views.words[WORD_AWAKE] = 0
        views.header[MSG_STEP] = views.header[MSG_ROWS] = 0

    def _lay(self, rows: npt.NDArray[np.int64]) -> None:
        views = self._views
        views.header[MSG_ROWS] = len(rows)
        views.rows[: len(rows)] = rows
        views.read[: len(rows)] = 0

    def _raise(self) -> None:
        self._seq = self._seq % _MOST_SEQ + 1
        raise_seq(self._views.words, self._address, self._layout.actors, self._seq)

    def collect(self, out: npt.NDArray[np.float32], lse: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Wait for the answer to the last :meth:`post`.

        Args:
            out: (rows, heads, dim) float32, written. lse: (rows, heads) float32, natural log, written.

        Returns:
            Rows whose search failed; what is written for them means nothing.

        Raises:
            WorkersLate: there is none. Actors that come back find an empty message.
        """
        lay, views = self._layout, self._views
        deadline = time.monotonic() + self._limit_s
        slice_ns = min(_SLICE_NS, int(self._limit_s * 1e9))
        while await_actors(views.words, self._address, lay.actors, self._seq, self._spin_ns, slice_ns, self._timeout):
            late = time.monotonic() > deadline
            if late or not self._alive():
                views.header[MSG_ROWS] = 0
                why = f"have not answered for {self._limit_s:g} s" if late else "are gone"
                raise WorkersLate(f"CPU workers {why}")
        rows = len(out)
        partials = views.partials[:rows]
        out[:] = partials[..., : lay.group * lay.dim].reshape(rows, lay.heads, lay.dim)
        lse[:] = partials[..., lay.group * lay.dim :].reshape(rows, lay.heads)
        failed: npt.NDArray[np.int64] = np.flatnonzero((lse == FAILED).any(1))
        return failed

    def idle(self) -> bool:
        """Whether every actor is done with the last message, also if nobody waits for it any more."""
        words, views = self._views.words, self._views
        return all(int(words[views.actor_word(a, ACTOR_DONE)]) == self._seq for a in range(self._layout.actors))

    def search_stats(self) -> tuple[float, int, int]:
        """Seconds of the slowest actor, keys scored by code, and rows read, of the last message."""
        stats: Any = self._views.stats
        return float(stats[:, STAT_NS].max()) * 1e-9, int(stats[:, STAT_CODES].sum()), int(stats[:, STAT_ROWS].sum())

    def stop(self) -> None:
        """Tell every lane to leave its loop, and wake those that sleep."""
        self._views.words[WORD_STOP] = 1
        self._views.header[MSG_ROWS] = 0
        self._raise()
