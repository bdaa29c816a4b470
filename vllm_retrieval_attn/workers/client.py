"""The vLLM worker's side of the ring: post the rows of a layer, wait, take the results."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    MSG_LAYER,
    MSG_PROBE,
    MSG_ROWS,
    STAT_CODES,
    STAT_NS,
    STAT_ROWS,
    WORD_SEQ,
    WORD_STOP,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.desk import FAILED
from vllm_retrieval_attn.workers.signals import await_actors, raise_seq

_SLICE_NS = 100_000_000
"""How long to wait for an answer before looking whether the actors still live."""


class WorkersUnavailable(RuntimeError):
    """The CPU workers did not answer and could not be brought back."""


class RingClient:
    """Posts messages and collects answers; used by one thread.

    Args:
        layout, views: the shared file of the rank.
        spin_ns: how long to yield before sleeping.
        revive: called about every 100 ms of waiting, with the monotonic time since when an answer is
            awaited; brings dead actors back and returns the time from which to count on, or raises
            WorkersUnavailable.
    """

    def __init__(self, layout: Layout, views: Views, spin_ns: int, revive: Callable[[float], float]) -> None:
        self._layout, self._views = layout, views
        self._spin_ns, self._revive = spin_ns, revive
        self._timeout = np.array((0, 20_000_000), np.int64)
        self._seq = int(views.words[WORD_SEQ])
        self._address = views.words.ctypes.data

    def post(self, layer: int, rows: npt.NDArray[np.int64], probe: int = -1) -> None:
        """Send a layer's rows; ``views.queries`` and ``views.outside`` must already hold theirs, in the same order.

        Args:
            layer: index of the layer within the arena.
            rows: (n, ROW_FIELDS) int64, see store/layout.py. probe: number of the row whose choice is to be kept.
        """
        views = self._views
        views.header[MSG_LAYER], views.header[MSG_ROWS], views.header[MSG_PROBE] = layer, len(rows), probe
        views.rows[: len(rows)] = rows
        self._seq = self._seq % 0x3FFFFFFF + 1
        raise_seq(views.words, self._address, self._layout.actors, self._seq)

    def collect(self, out: npt.NDArray[np.float32], lse: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Wait for the answer to the last :meth:`post`.

        Args:
            out: (rows, heads, dim) float32, written. lse: (rows, heads) float32, natural log, written.

        Returns:
            Rows whose search failed; what is written for them means nothing.

        Raises:
            WorkersUnavailable: from ``revive``.
        """
        lay, views = self._layout, self._views
        since = time.monotonic()
        while await_actors(views.words, self._address, lay.actors, self._seq, self._spin_ns, _SLICE_NS, self._timeout):
            since = self._revive(since)
        rows = len(out)
        partials = views.partials[:rows]
        out[:] = partials[..., : lay.group * lay.dim].reshape(rows, lay.heads, lay.dim)
        lse[:] = partials[..., lay.group * lay.dim :].reshape(rows, lay.heads)
        failed: npt.NDArray[np.int64] = np.flatnonzero((lse == FAILED).any(1))
        return failed

    def abandon(self) -> None:
        """Forget the last message, so that lanes that come back later do not serve it."""
        self._views.header[MSG_ROWS] = 0

    def search_stats(self) -> tuple[float, int, int]:
        """Seconds of the slowest actor, keys scored by code, and rows read, of the last message."""
        stats: Any = self._views.stats
        return float(stats[:, STAT_NS].max()) * 1e-9, int(stats[:, STAT_CODES].sum()), int(stats[:, STAT_ROWS].sum())

    def stop(self) -> None:
        """Tell every lane to leave its loop."""
        self._views.words[WORD_STOP] = 1
        self.post(0, self._views.rows[:0])
