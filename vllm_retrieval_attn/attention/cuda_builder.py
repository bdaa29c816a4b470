"""Builds indexes on the GPU, beside the model: a thread of the vLLM worker with a stream of its own.

Rows come back from the pinned arena, some layers at a time; what is built goes into the shared file, where the CPU
workers search it. They build nothing meanwhile, until a build here has failed.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

FREE_SHARE = 0.25
"""Share of the GPU memory left free by vLLM that a build may take. The kernels of a build wait for those of a prefill,
one after the other: the more layers they serve at once, the sooner it is done."""
WORK_BYTES = 1 << 30
"""So much may be taken in any case, but no more than half of what is free."""
ROWS = 10
"""Arrays of the size of the keys in float32 that a build holds at its widest; calibration holds 5, and three scores of
each sampled query and key. tests/gpu compares."""


class _Copier:
    """Copies slabs home while the next ones are built: through two buffers, pinned for a GPU, by a thread of its own.

    Args:
        work: knows where slabs go. device: where they come from.
    """

    def __init__(self, work: SlabWork, device: torch.device) -> None:
        self._work, self._pinned = work, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "retrieval-slab-copier")
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._under_way: list[Future[None] | None] = [None, None]
        self._turn = 0

    def __call__(self, starts: list[int], slabs: torch.Tensor) -> None:
        self._turn ^= 1
        if (copying := self._under_way[self._turn]) is not None:
            copying.result()
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < len(slabs):
            buffer = self._buffers[self._turn] = torch.empty(slabs.shape, dtype=slabs.dtype, pin_memory=self._pinned)
        home = buffer[: len(slabs)].copy_(slabs)  # waits for the GPU
        self._under_way[self._turn] = self._thread.submit(self._work.write, starts, home)

    def finish(self) -> None:
        """Wait until all slabs are where they belong."""
        under_way = [copying for copying in self._under_way if copying is not None]
        self._under_way = [None, None]
        wait(under_way)
        for copying in under_way:
            copying.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class DeviceBuilder(threading.Thread):
    """Builds one segment after the other, all KV heads.

    Args:
        layout, views, pages: the shared file of the rank and its pages (Arena.pages). device: where to build.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.

    Attributes:
        busy: the slab that is being written; -1: none.
        refused: jobs for the CPU workers, once a build here has failed.
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
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self.refused: SimpleQueue[Job] = SimpleQueue()
        self.busy = -1
        self._told = False
        self._stopping = threading.Event()
        self._copier = _Copier(self._work, device)
        self.layers_at_once = layout.layers  # as far as memory goes: see run
        self.start()

    def post(self, *job: int) -> None:
        """Queue a build: the numbers of a job, see store/layout.py."""
        self._queue.put(np.array(job, np.int64))

    def run(self) -> None:
        torch.set_num_threads(1)
        chosen = False
        while (job := self._queue.get()) is not None and not self._stopping.is_set():
            try:
                if not chosen and self._device.type == "cuda":  # by now vLLM has taken its memory
                    torch.cuda.set_device(self._device)
                    self._choose_layers(torch.cuda.mem_get_info(self._device)[0])
                chosen = True
                self._try(job)
            except np.linalg.LinAlgError:  # keys that are no numbers: the request ended, or its model has gone astray
                if self._wanted(job):  # stays sealed and is scanned exactly
                    logger.exception("retrieval: building an index on the GPU failed")
            except Exception:  # short memory has many names in CUDA; the CPU workers can build whatever it was
                chosen, self.layers_at_once = True, 0
                if not self._stopping.is_set():
                    logger.exception(
                        "retrieval: building an index on the GPU failed; the CPU workers build from now on"
                    )
                    self._told = True
                    self.refused.put(job)
            self.busy = -1

    def _wanted(self, job: Job) -> bool:
        """Whether the slab of a job still waits for it."""
        return int(self._views.generations[int(job[JOB_SLAB])]) == int(job[JOB_GENERATION])

    def _choose_layers(self, free: int) -> None:
        lay = self._layout
        floats = max(ROWS * lay.dim, 5 * lay.dim + 3 * lay.group * lay.samples)
        layer_bytes = 4 * floats * lay.kv_heads * lay.segment_tokens
        most = min(lay.layers, int(max(min(WORK_BYTES, free / 2), free * FREE_SHARE)) // layer_bytes)
        self.layers_at_once = -(-lay.layers // -(-lay.layers // most)) if most else 0  # equal parts
        logger.debug("retrieval: indexes of %d layers at a time are built on the GPU", self.layers_at_once)

    def _try(self, job: Job) -> None:
        """Build; where GPU memory is short less at once, in the end not here. Segments are built in their order: the
        first of a request makes the transforms of all."""
        while self.layers_at_once:
            try:
                with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    self._serve(job)
                return
            except torch.OutOfMemoryError:
                self.layers_at_once //= 2
            torch.cuda.empty_cache()  # not above: there the error still holds on to what the build had
        if not self._told:
            logger.warning(
                "retrieval: too little GPU memory is free to build indexes there; the CPU workers build them (lower "
                "--gpu-memory-utilization, or set build_on to 'cpu')"
            )
        self._told = True
        self.refused.put(job)

    def stop(self) -> None:
        self._stopping.set()
        self._queue.put(None)
        self.join(timeout=5)
        if not self.is_alive():
            self._copier.close()

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
        try:
            for first in range(0, lay.layers, at_once):
                layers = range(first, min(lay.layers, first + at_once))
                if int(views.generations[slab]) != generation or self._stopping.is_set():
                    return
                self._work.build_layers(layers, self._fetch(table, layers), job, self._copier)
        finally:
            self._copier.finish()
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
