"""Background threads of an actor that build the indexes of sealed segments of its KV heads.

Jobs come through the shared file (store/indexing.py); nothing waits for a build. A restarted actor goes on where its
count of finished jobs stands.
"""

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.store.layout import (
    ACTOR_JOBS,
    ACTOR_SLAB,
    JOB_GENERATION,
    JOB_KIND,
    JOB_REFRESH,
    JOB_SEGMENT,
    JOB_SLAB,
    JOB_TABLE,
    JOBS,
    WORD_JOBS,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval")

Job = npt.NDArray[np.int64]
"""JOB_FIELDS numbers, see store/layout.py."""

_POLL_S = 0.02
_NICE = 15
"""Builders give way to everything else on the machine."""


class SegmentWork(Protocol):
    """What a builder does for one layer of a segment, for the KV heads of its actor. Called from several threads."""

    def build(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        """Index the segment's rows, which lie in ``pages`` (int64)."""

    def refresh(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        """Look whether what was calibrated still fits the sampled queries."""


class Builder(threading.Thread):
    """Serves the build queue for one actor.

    Args:
        layout, views: the shared file of the rank. actor: which share of the KV heads. threads: layers built at once.
        work: what to do. lost: whether what was built before died with the process, so that all is built again.
    """

    def __init__(
        self, layout: Layout, views: Views, actor: int, threads: int, work: SegmentWork, lost: bool = False
    ) -> None:
        super().__init__(name=f"retrieval-builder-{actor}", daemon=True)
        self._layout, self._views, self._actor, self._work = layout, views, actor, work
        if lost:  # of a ring of JOBS; what is older is scanned exactly
            done = views.actor_word(actor, ACTOR_JOBS)
            views.words[done] = max(0, int(views.words[done]) - JOBS // 2)
        self._workers = ThreadPoolExecutor(threads, initializer=be_nice)
        self._stopping = threading.Event()
        views.words[views.actor_word(actor, ACTOR_SLAB)] = -1

    def run(self) -> None:
        be_nice()
        words = self._views.words
        done = self._views.actor_word(self._actor, ACTOR_JOBS)
        while not self._stopping.is_set():
            count = int(words[done])
            if count == int(words[WORD_JOBS]):
                self._stopping.wait(_POLL_S)
                continue
            full_fence()
            job = self._views.jobs[count % JOBS].copy()
            try:
                self._serve(job)
            except Exception:
                if int(self._views.generations[int(job[JOB_SLAB])]) == int(job[JOB_GENERATION]):
                    # The segment stays sealed and is scanned exactly.
                    logger.exception("retrieval: building an index failed")
            words[self._views.actor_word(self._actor, ACTOR_SLAB)] = -1
            words[done] = count + 1

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _serve(self, job: Job) -> None:
        views, lay = self._views, self._layout
        slab, generation = int(job[JOB_SLAB]), int(job[JOB_GENERATION])
        views.words[views.actor_word(self._actor, ACTOR_SLAB)] = slab
        full_fence()  # before the look at the generation: see store/indexing.py
        count = lay.segment_tokens // lay.page_tokens
        table = views.tables[int(job[JOB_TABLE]), int(job[JOB_SEGMENT]) * count :][:count].copy()
        if len(table) < count or table.min() < 0 or table.max() >= lay.pages:
            return  # the request ended
        pages = torch.from_numpy(table)
        refresh = int(job[JOB_KIND]) == JOB_REFRESH

        def build(layer: int) -> None:
            if int(views.generations[slab]) == generation and not self._stopping.is_set():
                (self._work.refresh if refresh else self._work.build)(layer, pages, job)

        layers = [self._workers.submit(build, layer) for layer in range(lay.layers)]
        wait(layers)  # all of them: the slab may be given away once this returns, or raises
        for layer in layers:
            layer.result()
        if int(views.generations[slab]) == generation and not refresh:
            full_fence()
            views.built[slab, self._actor] = generation


def be_nice() -> None:
    """Give this thread one core at most, and only when nothing else wants it."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
