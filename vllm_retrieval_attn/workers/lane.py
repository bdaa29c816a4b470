"""One search thread of an actor: waits for messages and does units of them (workers/message.py)."""

import threading
import time
from collections.abc import Iterator

import faiss
import numpy as np

from vllm_retrieval_attn.store.layout import STAT_CODES, STAT_NS, STAT_ROWS, WORD_CLIENT_PID, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.message import LaneScratch, Worktop
from vllm_retrieval_attn.workers.signals import await_message, finish_message

SLICE_NS = 500_000_000
"""How long a lane serves before it looks whether its client still lives."""
SLEEP = (0, 200_000_000)
"""Longest single sleep (s, ns) of an idle lane."""


class Lane(threading.Thread):
    """Serves messages until the client stops the ring or dies.

    Args:
        layout, views: the shared file of the rank. top: of the actor.
        actor, thread: which lane this is.
        spin_ns: how long to yield after a message before sleeping.
    """

    def __init__(self, layout: Layout, views: Views, top: Worktop, actor: int, thread: int, spin_ns: int) -> None:
        super().__init__(name=f"retrieval-lane-{actor}.{thread}", daemon=True)
        self._layout, self._views, self._top = layout, views, top
        self._lane = actor * layout.threads + thread
        self._spin_ns = spin_ns
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
        faiss.omp_set_num_threads(1)  # counts for the calling thread alone
        words, lane, scratch = self._views.words, self._lane, LaneScratch(self._layout)
        timeout = np.array(SLEEP, np.int64)
        slice_ns = 0
        for _ in self._while_client_lives():
            until = time.monotonic_ns() + slice_ns
            seq = await_message(words, words.ctypes.data, lane, self._spin_ns, until, timeout)
            while seq >= 0:
                begin = time.monotonic_ns()
                codes, rows = self._top.message(seq).serve(scratch)
                stats = self._views.stats[lane]
                stats[STAT_CODES], stats[STAT_ROWS] = codes, rows
                stats[STAT_NS] = time.monotonic_ns() - begin
                finish_message(words, words.ctypes.data, lane, seq)
                seq = await_message(words, words.ctypes.data, lane, self._spin_ns, until, timeout)
            slice_ns = SLICE_NS
            self.ready.set()
            if words[WORD_STOP]:
                return
