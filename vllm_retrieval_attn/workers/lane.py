# SPDX-License-Identifier: Apache-2.0
"""The threads of an actor: one leads, the others follow (workers/units.py).

The leader lays messages out, in Python, and waits for the others, which never need Python's lock meanwhile. It does no
unit itself: to hand compiled code what it needs for that takes longer than to lay a message out.
"""

import threading
import time
from collections.abc import Iterator

import faiss
import numpy as np

from vllm_retrieval_attn.store.layout import STAT_CODES, STAT_NS, STAT_ROWS, WORD_CLIENT_PID, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.desk import CODES, ROWS, Desk
from vllm_retrieval_attn.workers.signals import await_message, finish_message
from vllm_retrieval_attn.workers.tasks import lane_memory
from vllm_retrieval_attn.workers.units import close_desk, follow, open_desk

SLICE_NS = 500_000_000
"""How long a lane serves before it looks whether its client still lives."""
SLEEP = (0, 200_000_000)
"""Longest single sleep (s, ns) of an idle lane."""
LEADER = -1
"""In place of a thread's number."""


class Lane(threading.Thread):
    """Serves messages until the client stops the ring or dies.

    Args:
        layout, views: the shared file of the rank. desk: of the actor.
        actor, thread: which lane this is; LEADER leads.
        spin_ns: how long to yield after a message before sleeping.
    """

    def __init__(self, layout: Layout, views: Views, desk: Desk, actor: int, thread: int, spin_ns: int) -> None:
        super().__init__(name=f"retrieval-lane-{actor}.{thread}", daemon=True)
        self._views, self._desk, self._actor, self._leads = views, desk, actor, thread == LEADER
        self._spin_ns = spin_ns
        self._memory = None if self._leads else lane_memory(layout, desk.geometry.candidates)
        self._timeout = np.array(SLEEP, np.int64)
        self.ready = threading.Event()
        """Set once the lane has looked for a message: compiled and serving."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            faiss.omp_set_num_threads(1)  # counts for the calling thread alone
            serve = self._lead if self._leads else self._follow
            slice_ns = 0
            for _ in self._while_client_lives():
                serve(time.monotonic_ns() + slice_ns)
                slice_ns = SLICE_NS
                self.ready.set()
                if self._views.words[WORD_STOP]:
                    return
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

    def _follow(self, until_ns: int) -> None:
        desk = self._desk
        follow(desk.numbers, desk.geometry, desk.shared, self._memory, self._spin_ns, until_ns, self._timeout)

    def _lead(self, until_ns: int) -> None:
        words = self._views.words
        if not self.ready.is_set():
            close_desk(self._desk.numbers)  # compiled, or loaded, before the first message
        while True:
            seq = await_message(words, words.ctypes.data, self._actor, self._spin_ns, until_ns, self._timeout)
            if seq < 0:
                return
            begin = time.monotonic_ns()
            desk, stats = self._desk, self._views.stats[self._actor]
            desk.lay_out(seq)
            open_desk(desk.numbers, seq)
            close_desk(desk.numbers)
            desk.clear()
            stats[STAT_CODES], stats[STAT_ROWS] = desk.numbers[CODES], desk.numbers[ROWS]
            stats[STAT_NS] = time.monotonic_ns() - begin
            finish_message(words, words.ctypes.data, self._actor, seq)
            desk.lay_ahead(seq + 1)
