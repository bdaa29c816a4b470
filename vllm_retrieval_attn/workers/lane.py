"""One search thread of an actor: the Python side of ring.serve_lane, with its scratch memory."""

import threading
import time

import numpy as np

from vllm_retrieval_attn.index.kernels import scratch
from vllm_retrieval_attn.store.layout import WORD_CLIENT_PID, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.ring import STOPPED, serve_lane

_SLICE_NS = 500_000_000
"""How long a lane serves before it looks whether its client still lives."""
_SLEEP = (0, 200_000_000)
"""Longest single sleep (s, ns) of an idle lane."""


class Lane(threading.Thread):
    """Serves messages until the client stops the ring or dies.

    Args:
        layout, views: the shared file of the rank.
        actor, thread: which lane this is.
        scale: softmax scale.
        spin_ns: how long to yield after a message before sleeping.
    """

    def __init__(self, layout: Layout, views: Views, actor: int, thread: int, scale: float, spin_ns: int) -> None:
        super().__init__(name=f"retrieval-lane-{actor}.{thread}", daemon=True)
        self._layout, self._views = layout, views
        self._actor, self._thread_number = actor, thread
        self._scale, self._spin_ns = scale, spin_ns
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.error = error
            raise

    def _serve(self) -> None:
        lay, views = self._layout, self._views
        q = np.empty((lay.group, lay.dim), np.float32)
        work = (
            q,
            q.view(np.uint32),
            np.empty_like(q),
            np.empty(lay.group, np.float32),
            np.empty(lay.group, np.float32),
            *scratch(lay.group, lay.dim),
        )
        timeout = np.array(_SLEEP, np.int64)
        client = int(views.words[WORD_CLIENT_PID])
        started = process_start(client)
        while started is not None and process_start(client) == started:
            state = serve_lane(
                views.words, views.words.ctypes.data, views.header, views.rows, views.stats, views.tables,
                views.queries16, views.queries32, views.pages16, views.pages32, views.partials[self._actor],
                self._actor, self._thread_number, lay.actors, lay.threads, lay.kv_heads, lay.group, lay.dim,
                lay.layers, lay.page_tokens, lay.dtype_code, np.float32(self._scale), self._spin_ns,
                time.monotonic_ns() + _SLICE_NS, *work, timeout,
            )  # fmt: skip
            if state == STOPPED or views.words[WORD_STOP]:
                return
