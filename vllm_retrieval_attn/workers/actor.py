"""The Ray actor: a process that maps the arena and runs the lanes of one share of the KV heads.

Ray starts it, places it and notices its end; no call of Ray is made while it serves.
"""

import os

from vllm_retrieval_attn.config import COMPARED
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.attended import AttendedRows
from vllm_retrieval_attn.workers.builder import Builder, SegmentWork
from vllm_retrieval_attn.workers.lane import Lane
from vllm_retrieval_attn.workers.prober import Attended, Prober
from vllm_retrieval_attn.workers.slab_work import SlabWork


class SearchActor:
    """Serves the KV heads ``h`` with ``h % layout.actors == actor``.

    Args:
        path: shared file of the rank. layout: its shape. actor: which share.
        scale: softmax scale. spin_ns: see workers/lane.py.
        cpus: CPU numbers to run on; a vLLM CPU worker may have bound itself, and so its children.
        kind: which index. share: see workers/slab_work.py. again: whether another process had this share before.
    """

    def __init__(
        self,
        path: str,
        layout: Layout,
        actor: int,
        scale: float,
        spin_ns: int,
        cpus: list[int],
        kind: str,
        share: float,
        again: bool,
    ) -> None:
        os.sched_setaffinity(0, cpus)
        self._file = SharedFile.attach(path)
        self._views = Views(layout, self._file.map)
        views = self._views
        self._lanes: list[Lane]
        work: SegmentWork
        attended: Attended
        if kind in COMPARED:
            from vllm_retrieval_attn.workers.library import LibraryIndexes, LibraryLane

            work = indexes = LibraryIndexes(layout, views, actor, kind, scale)
            attended = indexes.attended
            self._lanes = [LibraryLane(indexes, actor, spin_ns)]
        else:
            self._lanes = [Lane(layout, views, actor, t, scale, spin_ns) for t in range(layout.threads)]
            if layout.slabs:
                heads = list(range(actor, layout.kv_heads, layout.actors))
                work, attended = SlabWork(layout, views, heads, scale, share), AttendedRows(layout, views, scale)
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            lane.ready.wait()  # the first start on a machine compiles for a minute
            if lane.error is not None:
                raise lane.error
        if layout.slabs:
            self._builder = Builder(layout, views, actor, layout.threads, work, lost=again and kind in COMPARED)
            self._builder.start()
            self._prober = Prober(layout, views, actor, scale, attended)
            self._prober.start()
        # Last, since the client takes the process for attached from here on.
        views.words[views.actor_word(actor)] = os.getpid()

    def pid(self) -> int:
        """Process id; the call returns once the actor is attached."""
        return os.getpid()
