"""The Ray actor: a process that maps the arena and runs the lanes of one share of the KV heads.

Ray starts it, places it and notices its end; no call of Ray is made while it serves.
"""

import os

from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.lane import Lane


class SearchActor:
    """Serves the KV heads ``h`` with ``h % layout.actors == actor``.

    Args:
        path: shared file of the rank. layout: its shape. actor: which share.
        scale: softmax scale. spin_ns: see workers/lane.py.
        cpus: CPU numbers to run on; a vLLM CPU worker may have bound itself, and so its children.
        share: see workers/builder.py.
    """

    def __init__(
        self, path: str, layout: Layout, actor: int, scale: float, spin_ns: int, cpus: list[int], share: float
    ) -> None:
        os.sched_setaffinity(0, cpus)
        self._file = SharedFile.attach(path)
        self._views = Views(layout, self._file.map)
        self._lanes = [Lane(layout, self._views, actor, t, scale, spin_ns) for t in range(layout.threads)]
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            lane.ready.wait()  # the first start on a machine compiles for a minute
            if lane.error is not None:
                raise lane.error
        if layout.slabs:
            from vllm_retrieval_attn.workers.builder import Builder

            self._builder = Builder(layout, self._views, actor, layout.threads, scale, share)
            self._builder.start()
        # Last, since the client takes the process for attached from here on.
        self._views.words[self._views.actor_word(actor)] = os.getpid()

    def pid(self) -> int:
        """Process id; the call returns once the actor is attached."""
        return os.getpid()
