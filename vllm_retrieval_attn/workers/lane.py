"""One search thread of an actor: the Python side of ring.serve_lane, with its scratch memory."""

import threading
import time
from collections.abc import Iterator

import numpy as np

from vllm_retrieval_attn.index.kernels import scratch
from vllm_retrieval_attn.index.search import MAX_NODES, Scratch, offsets_of
from vllm_retrieval_attn.index.segment import NODE, SegmentShape
from vllm_retrieval_attn.store.layout import WORD_CLIENT_PID, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.ring import STOPPED, serve_lane

SLICE_NS = 500_000_000
"""How long a lane serves before it looks whether its client still lives."""
SLEEP = (0, 200_000_000)
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
        self.ready = threading.Event()
        """Set once the lane has looked for a message: compiled and serving."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ready.set()

    def _while_client_lives(self) -> Iterator[None]:
        client = int(self._views.words[WORD_CLIENT_PID])
        started = process_start(client)
        while started is not None and process_start(client) == started:
            yield

    def _serve(self) -> None:
        lay, views = self._layout, self._views
        q = np.empty((lay.group, lay.dim), np.float32)
        running = (np.empty_like(q), np.empty(lay.group, np.float32), np.empty(lay.group, np.float32))
        most = min(MAX_NODES, lay.table_segments * lay.segment_tokens // NODE) if lay.slabs else 1
        at = np.zeros(len(SegmentShape(NODE, 8).offsets) - 1, np.int64)
        if lay.slabs:
            at = offsets_of(SegmentShape(lay.segment_tokens, lay.dim))
        work = (
            scratch(lay.group, lay.dim),
            Scratch(lay.group, lay.dim, most).arrays,
            np.empty(lay.table_segments, np.int64),
            np.zeros(5, np.int64),
            np.empty(0, np.int64),
        )
        timeout = np.array(SLEEP, np.int64)
        slice_ns = 0
        for _ in self._while_client_lives():
            state = serve_lane(
                views.words, views.words.ctypes.data, views.header, views.rows, views.stats, views.tables,
                views.slab_tables, views.queries16, views.queries32, views.pages16, views.pages32, views.index8,
                views.index16, views.index32, views.index64, at, views.partials[self._actor], self._actor,
                self._thread_number, lay.actors, lay.threads, lay.kv_heads, lay.group, lay.dim, lay.layers,
                lay.page_tokens, lay.dtype_code, lay.segment_tokens, lay.slab_bytes, np.float32(self._scale),
                self._spin_ns, time.monotonic_ns() + slice_ns, q, q.view(np.uint32), *running, *work, timeout,
            )  # fmt: skip
            slice_ns = SLICE_NS
            self.ready.set()
            if state == STOPPED or views.words[WORD_STOP]:
                return
