"""A ring whose rows are indexed as far as their segments are full."""

import time

import numpy as np

from tests.unit.rings import Ring, make_layout
from vllm_retrieval_attn.index.segment import slab_bytes
from vllm_retrieval_attn.store.indexing import IndexQueue
from vllm_retrieval_attn.store.layout import ROW_INDEXED
from vllm_retrieval_attn.store.segments import RequestStore
from vllm_retrieval_attn.workers.builder import Builder
from vllm_retrieval_attn.workers.library import LibraryIndexes, LibraryLane
from vllm_retrieval_attn.workers.slab_work import SlabWork

SEGMENT, LAYERS = 256, 2


def layout(kind="attention", samples=4, **shape):
    base = make_layout(layers=LAYERS, page_tokens=64, table_pages=16, max_rows=4, **shape)
    extra = {
        "segment_tokens": SEGMENT, "slabs": 12, "slab_bytes": slab_bytes(kind, SEGMENT, base.dim), "samples": samples,
    }  # fmt: skip
    return type(base)(**{**vars(base), **extra})


class IndexedRing(Ring):
    """``kind`` is served as the engine does it: attention by slabs, others by workers/library.py."""

    def __init__(self, shape, dtype="float32", kind="attention"):
        super().__init__(shape, dtype)
        self.kind = kind
        self.index = IndexQueue(shape, self.views)
        self.works = [self.make_work(actor) for actor in range(shape.actors)]
        self.builders = [Builder(shape, self.views, actor, 1, work) for actor, work in enumerate(self.works)]
        self.stores = []

    def make_work(self, actor):
        if self.kind == "attention":
            heads = list(range(actor, self.layout.kv_heads, self.layout.actors))
            return SlabWork(self.layout, self.views, heads, self.scale, 0.0)
        return LibraryIndexes(self.layout, self.views, actor, self.kind, self.scale)

    def start(self, actor, thread):
        if self.kind == "attention":
            return super().start(actor, thread)
        lane = LibraryLane(self.works[actor], actor, self.spin_ns)
        lane.start()
        assert lane.ready.wait(300)
        self.lanes.append(lane)
        return lane

    def fill_statistics(self):
        self.views.moments[:] = np.eye(self.layout.dim, dtype=np.float32)
        self.views.sample_lse[:] = -np.inf

    def index_rows(self, message):
        """Index every full segment of a message's rows, in all layers (the others hold poison)."""
        self.fill_statistics()
        for row in message:
            store = RequestStore(f"r{row[0]}", 1, int(row[0]), SEGMENT)
            self.stores.append(store)
            for segment in store.written(int(row[1])):
                self.index.add(store, segment)
        self.run_builders()
        for row, store in zip(message, self.stores[-len(message) :], strict=True):
            row[ROW_INDEXED] = store.indexed(int(row[1]))
            assert row[ROW_INDEXED] == row[1] // SEGMENT

    def run_builders(self):
        for builder in self.builders:
            if not builder.is_alive():
                builder.start()
        deadline = time.monotonic() + 60
        while self.index.pending and time.monotonic() < deadline:
            self.index.poll()
            time.sleep(0.002)

    def close(self):
        for builder in self.builders:
            if builder.is_alive():
                builder.stop()
        self.builders.clear()
        self.works.clear()
        self.index._views = None
        super().close()
