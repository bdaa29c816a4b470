"""Builds indexes on the GPU, beside the model: a thread of the vLLM worker with a stream of its own.

Rows come back from the pinned arena, some layers at a time; what is built goes into the shared file, where the CPU
workers search it. While this builds, they have nothing to build.
"""

import logging
import threading
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.store.layout import JOB_GENERATION, JOB_SEGMENT, JOB_SLAB, JOB_TABLE, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.builder import Job
from vllm_retrieval_attn.workers.slab_work import SlabWork
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval")

WORK_BYTES = 1 << 30
"""GPU memory for a build at its widest: the scores of all points with all centroids, twice, and the rows in float32."""


class DeviceBuilder(threading.Thread):
    """Builds one segment after the other, all KV heads.

    Args:
        layout, views, pages: the shared file of the rank and its pages (Arena.pages). device: where to build.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.

    Attributes:
        busy: the slab that is being written; -1: none.
    """

    def __init__(
        self, layout: Layout, views: Views, pages: torch.Tensor, device: torch.device, scale: float, share: float
    ) -> None:
        super().__init__(name="retrieval-device-builder", daemon=True)
        self._layout, self._views, self._pages, self._device = layout, views, pages, device
        self._work = SlabWork(layout, views, list(range(layout.kv_heads)), scale, share)
        self._stream: Any = torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self.busy = -1
        floats = layout.segment_tokens * (2 * layout.segment_tokens // 16 + 8 * layout.dim)
        self.layers_at_once = min(layout.layers, max(1, WORK_BYTES // (4 * floats * layout.kv_heads)))
        self.start()

    def post(self, *job: int) -> None:
        """Queue a build: the numbers of a job, see store/layout.py."""
        self._queue.put(np.array(job, np.int64))

    def run(self) -> None:
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (job := self._queue.get()) is not None:
            try:
                with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    self._serve(job)
            except Exception:
                # The segment stays sealed and is scanned exactly.
                logger.exception("retrieval: building an index on the GPU failed")
            self.busy = -1

    def stop(self) -> None:
        self._queue.put(None)
        self.join(timeout=10)

    def _serve(self, job: Job) -> None:
        views, lay = self._views, self._layout
        slab, generation = int(job[JOB_SLAB]), int(job[JOB_GENERATION])
        self.busy = slab  # before the look at the generation: see store/indexing.py
        full_fence()
        count = lay.segment_tokens // lay.page_tokens
        table = views.tables[int(job[JOB_TABLE]), int(job[JOB_SEGMENT]) * count :][:count].copy()
        if len(table) < count or table.min() < 0 or table.max() >= lay.pages:
            return  # the request ended
        for first in range(0, lay.layers, self.layers_at_once):
            layers = range(first, min(lay.layers, first + self.layers_at_once))
            if int(views.generations[slab]) != generation:
                return
            self._work.build_layers(layers, self._fetch(table, layers), job)
        if int(views.generations[slab]) == generation:
            full_fence()
            views.built[slab] = generation

    def _fetch(self, table: Job, layers: range) -> torch.Tensor:
        """(layers * kv_heads, 2, segment_tokens, d) float32 rows on the device, one copy a page."""
        lay = self._layout
        shape = (len(table), len(layers), lay.kv_heads, 2, lay.page_tokens, lay.dim)
        stage = torch.empty(shape, dtype=self._pages.dtype, device=self._device)
        for place, page in enumerate(table):
            stage[place].copy_(self._pages[int(page), layers.start : layers.stop], non_blocking=True)
        return stage.permute(1, 2, 3, 0, 4, 5).reshape(len(layers) * lay.kv_heads, 2, -1, lay.dim).float()
