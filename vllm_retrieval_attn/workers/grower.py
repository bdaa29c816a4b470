# SPDX-License-Identifier: Apache-2.0
"""Background threads of an actor that let indexes grow behind the tokens as they are written.

Nothing waits for them but a message that needs more than is there: they are called then (Indexes.want), and it does its
own part beside them.
"""

import contextlib
import logging
import os
import threading
import time

from vllm_retrieval_attn.store.layout import WORD_GROWTH, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.indexes import Indexes, RequestGone

logger = logging.getLogger("vllm.retrieval.workers")

_POLL_S, _IDLE_POLL_S = 0.02, 0.25
_IDLE_AFTER_S = 1.0
_NICE = 15
"""Background threads give way to everything else on the machine."""


def be_nice() -> None:
    """Run only when nothing else wants the core."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class Grower(threading.Thread):
    """Serves every ``of``-th (layer, KV head) of an actor, from number ``thread`` on.

    Args:
        layout, views: the shared file of the rank. indexes: of the actor.
    """

    def __init__(self, layout: Layout, views: Views, indexes: Indexes, thread: int, of: int) -> None:
        super().__init__(name=f"retrieval-grower-{thread}", daemon=True)
        self._views, self._indexes, self._thread_number = views, indexes, thread
        pairs = [(layer, head) for layer in range(layout.layers) for head in indexes.heads]
        self._pairs = pairs[thread::of]
        self._stopping = False

    def run(self) -> None:
        be_nice()
        seen, changed = (-1, -1), time.monotonic()
        calls = 0
        while not self._stopping:
            poll_s = _POLL_S if time.monotonic() - changed < _IDLE_AFTER_S else _IDLE_POLL_S
            calls = self._indexes.await_call(calls, poll_s)
            now = int(self._views.words[WORD_GROWTH]), calls
            if now == seen or self._stopping:
                continue
            seen, changed = now, time.monotonic()
            if self._thread_number == 0:
                self._indexes.drop_stale()
            try:
                self._grow(calls)
            except Exception:  # the search that needs it tries again, and fails for its request alone
                logger.exception("retrieval: indexing in the background failed")

    def _grow(self, calls: int) -> None:
        """Until all is there, or somebody calls: a step waits for something else by now."""
        for slot, generation, tokens in self._indexes.live():
            for layer, head in self._pairs:
                if self._stopping or self._indexes.calls != calls:
                    return
                key = (slot, layer, head)
                if self._indexes.missing(key, generation, tokens):
                    try:
                        self._indexes.ready(key, generation, tokens)
                    except RequestGone:
                        break

    def stop(self) -> None:
        self._stopping = True
        self._indexes.call()
        self.join(timeout=5)
