"""Which segments are being indexed and which are: slabs of the shared file, and the queue of builds.

The vLLM worker gives a sealed segment a slab and queues a build; builders (workers/builder.py) write the slab and
note its generation when done. A slab that is taken back changes its generation, so a build that comes too late is
dropped; one that a builder is writing at that moment is not given away again until the builder has left it. Neither
are those of a request that ended while a decode step of it was being compared with exact search (workers/prober.py).
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_retrieval_attn.store.layout import (
    ACTOR_JOBS,
    ACTOR_SLAB,
    JOB_BUILD,
    JOB_REFRESH,
    JOBS,
    PROBE_ROW,
    ROW_TABLE,
    WORD_JOBS,
    Layout,
)
from vllm_retrieval_attn.store.segments import RequestStore, Segment, SegmentState
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.sync import full_fence

if TYPE_CHECKING:
    from vllm_retrieval_attn.attention.cuda_builder import DeviceBuilder


@dataclass
class Build:
    """A queued build."""

    store: RequestStore
    segment: Segment
    slab: int
    generation: int


class IndexQueue:
    """Used by the vLLM worker's main thread.

    Attributes:
        queued, built: builds ever queued and finished. refreshes: segments whose calibration was put in question.
        device_builder: builds in place of the CPU workers if it is there.
    """

    def __init__(self, layout: Layout, views: Views) -> None:
        self._layout, self._views = layout, views
        self._free = list(range(layout.slabs - 1, -1, -1))
        self._probed: list[int] = []  # of ended requests, still read by a probe
        self._generation = 0
        self._pending: list[Build] = []
        self._waiting: list[tuple[RequestStore, Segment]] = []
        self._busy_since = 0.0
        self._built_then = 0
        self.queued = self.built = self.refreshes = 0
        self.device_builder: DeviceBuilder | None = None
        views.generations[:] = 0
        views.built[:] = 0
        for actor in range(layout.actors):
            views.words[views.actor_word(actor, ACTOR_SLAB)] = -1

    @property
    def used_slabs(self) -> int:
        self._reclaim()
        return self._layout.slabs - len(self._free) - len(self._probed)

    @property
    def pending(self) -> int:
        """Segments that wait for their index."""
        return len(self._pending) + len(self._waiting)

    def seconds_left(self) -> float | None:
        """Estimate until all queued builds are done; None before the first has finished."""
        done = self.built - self._built_then
        if not self.pending:
            return 0.0
        return (time.monotonic() - self._busy_since) / done * self.pending if done else None

    def add(self, store: RequestStore, segment: Segment) -> None:
        """Index a sealed segment whose rows are complete in the arena."""
        if not self.pending:
            self._busy_since, self._built_then = time.monotonic(), self.built
        self._waiting.append((store, segment))
        self._submit()

    def _submit(self) -> None:
        """Queue builds while there are slabs and room; the rest of the segments are scanned exactly meanwhile."""
        views = self._views
        while self._waiting and self._room() > 0:
            slab = self._take_slab()
            if slab is None:
                return
            store, segment = self._waiting.pop(0)
            self._generation += 1
            build = Build(store, segment, slab, self._generation)
            store.slabs[segment.number] = slab
            views.generations[slab] = build.generation
            post = self._post if self.device_builder is None else self.device_builder.post
            post(build.generation, store.slot, segment.number, slab, JOB_BUILD)
            self._pending.append(build)
            self.queued += 1

    def _post(self, *job: int) -> None:
        views, words = self._views, self._views.words
        count = int(words[WORD_JOBS])
        views.jobs[count % JOBS] = job
        full_fence()
        words[WORD_JOBS] = count + 1

    def _room(self) -> int:
        """Jobs that may be queued."""
        views, words = self._views, self._views.words
        taken = min(int(words[views.actor_word(a, ACTOR_JOBS)]) for a in range(self._layout.actors))
        return JOBS - 1 - (int(words[WORD_JOBS]) - taken)

    def refresh(self, store: RequestStore) -> None:
        """Have the calibration of a request's indexed segments compared with its latest sampled queries. Segments
        that find no room in the queue are left as they are."""
        for segment in store.segments:
            if segment.state is SegmentState.INDEXED and self._room() > JOBS // 2:
                slab = store.slabs[segment.number]
                self._post(int(self._views.generations[slab]), store.slot, segment.number, slab, JOB_REFRESH)
                self.refreshes += 1

    def _reclaim(self) -> None:
        if self._probed and not self._views.probing():
            self._free.extend(self._probed)
            self._probed.clear()

    def _take_slab(self) -> int | None:
        views = self._views
        self._reclaim()
        busy = {int(views.words[views.actor_word(a, ACTOR_SLAB)]) for a in range(self._layout.actors)}
        if self.device_builder is not None:
            busy |= self.device_builder.busy
        for place in range(len(self._free) - 1, -1, -1):
            if self._free[place] not in busy:
                return self._free.pop(place)
        return None

    def poll(self) -> None:
        """Take in finished builds: their segments are searched by index from the next step on."""
        if not self.pending:
            return
        while self.device_builder is not None and not self.device_builder.refused.empty() and self._room() > 0:
            self._post(*self.device_builder.refused.get())
        views, lay = self._views, self._layout
        left = []
        for build in self._pending:
            if not (views.built[build.slab] == build.generation).all():
                left.append(build)
                continue
            build.segment.move(SegmentState.INDEXED)
            offset = lay.slabs_offset - lay.turns_offset + build.slab * lay.segment_slab_bytes
            views.slab_tables[build.store.slot, build.segment.number] = offset
            self.built += 1
        self._pending = left
        self._submit()

    def release(self, store: RequestStore) -> None:
        """Take back what a request's segments hold."""
        self._waiting = [item for item in self._waiting if item[0] is not store]
        self._pending = [build for build in self._pending if build.store is not store]
        for slab in store.slabs.values():
            self._views.generations[slab] = 0
        full_fence()  # before a later look at which slabs builders write to
        read = self._views.probing() and int(self._views.probe_numbers[PROBE_ROW + ROW_TABLE]) == store.slot
        (self._probed if read else self._free).extend(store.slabs.values())
        store.slabs.clear()
        self._views.slab_tables[store.slot] = np.iinfo(np.int64).min // 2
