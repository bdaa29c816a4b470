"""Builds indexes on the GPU, beside the model: a thread of the vLLM worker with a stream of its own.

Rows come back from the pinned arena, some layers at a time; what is built goes into the shared file, where the CPU
workers search it. They build nothing meanwhile but what does not fit the GPU's memory.
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

WORK_BYTES = 5 << 28
"""GPU memory for a build at its widest."""
_ROWS = 10
"""Arrays of the size of the keys in float32 that a build holds at its widest, measured by tests/gpu."""


class DeviceBuilder(threading.Thread):
    """Builds one segment after the other, all KV heads.

    Args:
        layout, views, pages: the shared file of the rank and its pages (Arena.pages). device: where to build.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.

    Attributes:
        busy: the slab that is being written; -1: none.
        refused: jobs for others, once GPU memory was short.
        layers_at_once: how many layers are built in one go; 0: none are built here.
    """

    def __init__(
        self, layout: Layout, views: Views, pages: torch.Tensor, device: torch.device, scale: float, share: float
    ) -> None:
        super().__init__(name="retrieval-device-builder", daemon=True)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._layout, self._views, self._pages, self._device = layout, views, pages, device
        self._work = SlabWork(layout, views, list(range(layout.kv_heads)), scale, share)
        self._stream: Any = torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self.refused: SimpleQueue[Job] = SimpleQueue()
        self.busy = -1
        layer_bytes = _ROWS * 4 * layout.kv_heads * layout.segment_tokens * layout.dim
        self.layers_at_once = min(layout.layers, max(1, WORK_BYTES // layer_bytes))
        self.start()

    def post(self, *job: int) -> None:
        """Queue a build: the numbers of a job, see store/layout.py."""
        self._queue.put(np.array(job, np.int64))

    def run(self) -> None:
        torch.set_num_threads(1)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (job := self._queue.get()) is not None:
            if self.layers_at_once == 0:
                self.refused.put(job)
                continue
            try:
                self._try(job)
            except Exception:
                if int(self._views.generations[int(job[JOB_SLAB])]) == int(job[JOB_GENERATION]):
                    # The segment stays sealed and is scanned exactly.
                    logger.exception("retrieval: building an index on the GPU failed")
            self.busy = -1

    def _try(self, job: Job) -> None:
        """Build; where GPU memory is short less at once, in the end not here. Segments are built in their order: the
        first of a request makes the transforms of all."""
        while self.layers_at_once:
            try:
                with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    self._serve(job)
                return
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.layers_at_once //= 2
        logger.warning(
            "retrieval: too little GPU memory is free to build indexes there; the CPU workers build them from now on "
            "(lower --gpu-memory-utilization, or set build_on to 'cpu')"
        )
        self.refused.put(job)

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
        at_once = self.layers_at_once
        for first in range(0, lay.layers, at_once):
            layers = range(first, min(lay.layers, first + at_once))
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
