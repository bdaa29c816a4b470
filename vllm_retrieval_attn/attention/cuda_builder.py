"""Builds indexes on the GPU, beside the model: a thread of the vLLM worker with a stream of its own.

Rows come back from the pinned arena, some layers at a time; what is built goes into the shared file, where the CPU
workers search it. They build nothing meanwhile, until a build here has failed.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.attention.slab_copier import SlabCopier
from vllm_retrieval_attn.store.layout import JOB_GENERATION, JOB_SEGMENT, JOB_SLAB, JOB_TABLE, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.builder import Job
from vllm_retrieval_attn.workers.slab_work import SlabWork
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval")

FREE_SHARE = 0.5
"""Share of the GPU memory left free by vLLM that a build may take; what it took is lent back where vLLM runs short. The
kernels of a build wait for those of a prefill, one after the other: the more layers they serve at once, the sooner it
is done."""


def build_bytes(heads: int, tokens: int, dim: int, sampled: int) -> int:
    """GPU memory of a build at its widest; tests/gpu compares.

    Args:
        heads: KV heads at once. tokens: of a segment. sampled: queries of a KV head to calibrate with.
    """
    # Arrays of the size of the keys in float32: six, or for calibration five and three scores of each query and key.
    return 4 * heads * tokens * max(6 * dim, 5 * dim + 3 * sampled)


class DeviceBuilder(threading.Thread):
    """Builds one segment after the other, all KV heads.

    Args:
        layout, views, pages: the shared file of the rank and its pages (Arena.pages). device: where to build.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.

    Attributes:
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
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.refused: SimpleQueue[Job] = SimpleQueue()
        self._busy: set[int] = set()
        self._told = self._chosen = False
        self._stopping = threading.Event()
        self._copier = SlabCopier(self._work.write, device)
        self.layers_at_once = layout.layers  # as far as memory goes: see _choose_layers
        self.start()

    @property
    def busy(self) -> set[int]:
        """The slabs that are being written."""
        return self._busy.copy()

    def post(self, *job: int) -> None:
        """Queue a build: the numbers of a job, see store/layout.py."""
        self._queue.put(partial(self._build, np.array(job, np.int64)))

    def warm_up(self) -> None:
        """Build once from noise, and wait for it. Kernels are compiled and loaded when they are first used; loading
        waits until the GPU has nothing else to do, which during a prefill takes seconds, and holds up the prefill."""
        begin, done = time.monotonic(), threading.Event()
        self._queue.put(partial(self._warm_up, done))
        while not done.wait(1):
            if not self.is_alive():
                raise RuntimeError("retrieval: the thread that builds indexes on the GPU ended while it was prepared")
        if self.layers_at_once:
            logger.info("retrieval: ready to build indexes on the GPU after %.1f s", time.monotonic() - begin)

    def run(self) -> None:
        torch.set_num_threads(1)
        while (task := self._queue.get()) is not None and not self._stopping.is_set():
            task()

    def _warm_up(self, done: threading.Event) -> None:
        try:
            self._choose_layers()
            if not self._fitting(self._rehearse):
                self._give_up(None, None)
        except Exception as error:  # whatever it is: the CPU workers can build
            self._give_up(None, error)
        finally:
            done.set()

    def _build(self, job: Job) -> None:
        try:
            if not self._chosen and self.layers_at_once:
                self._choose_layers()
            self._chosen = True  # vLLM has taken all its memory by the first job
            if not self._fitting(partial(self._serve, job)):
                self._give_up(job, None)
        except np.linalg.LinAlgError:  # keys that are no numbers: the request ended, or its model has gone astray
            if self._wanted(job):  # stays sealed and is scanned exactly
                logger.exception("retrieval: building an index on the GPU failed")
        except Exception as error:  # short memory has many names in CUDA; the CPU workers can build whatever it was
            self._give_up(job, error)

    def _wanted(self, job: Job) -> bool:
        """Whether the slab of a job still waits for it."""
        return int(self._views.generations[int(job[JOB_SLAB])]) == int(job[JOB_GENERATION])

    def _choose_layers(self) -> None:
        if self._device.type != "cuda":
            return
        torch.cuda.set_device(self._device)
        self.layers_at_once = self._layers_in(torch.cuda.mem_get_info(self._device)[0])
        logger.debug("retrieval: indexes of %d layers at a time are built on the GPU", self.layers_at_once)

    def _layers_in(self, free: int) -> int:
        lay = self._layout
        layer_bytes = build_bytes(lay.kv_heads, lay.segment_tokens, lay.dim, lay.group * lay.samples)
        most = min(lay.layers, int(free * FREE_SHARE) // layer_bytes)
        return -(-lay.layers // -(-lay.layers // most)) if most else 0  # equal parts

    def _fitting(self, build: Callable[[], None]) -> bool:
        """Build; where GPU memory is short fewer layers at once. False: not even one at a time."""
        while self.layers_at_once:
            try:
                with torch.inference_mode(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    build()
                return True
            except torch.OutOfMemoryError:
                self.layers_at_once //= 2
            torch.cuda.empty_cache()  # not above: there the error still holds on to what the build had
        return False

    def _give_up(self, job: Job | None, error: BaseException | None) -> None:
        """Leave this and all later builds to the CPU workers; in their order: the first of a request makes the
        transforms of all."""
        self.layers_at_once = 0
        if self._stopping.is_set():
            return
        if error is not None:
            logger.error(
                "retrieval: building an index on the GPU failed; the CPU workers build from now on", exc_info=error
            )
        elif not self._told:
            logger.warning(
                "retrieval: too little GPU memory is free to build indexes there; the CPU workers build them (lower "
                "--gpu-memory-utilization, or set build_on to 'cpu')"
            )
        self._told = True
        if job is not None:
            self.refused.put(job)

    def stop(self) -> None:
        self._stopping.set()
        self._queue.put(None)
        self.join(timeout=5)
        if not self.is_alive():
            self._copier.close()

    def _rehearse(self) -> None:
        lay = self._layout
        shape = self._stage_shape(lay.segment_tokens // lay.page_tokens, self.layers_at_once)
        noise = torch.randn(shape, dtype=self._pages.dtype, device=self._device)
        self._copier.prepare(self._work.rehearse(self._rows(noise)))
        if self._stream:
            self._stream.synchronize()
            torch.cuda.empty_cache()

    def _serve(self, job: Job) -> None:
        views, lay = self._views, self._layout
        slab, generation = int(job[JOB_SLAB]), int(job[JOB_GENERATION])
        self._busy.add(slab)  # before the look at the generation: see store/indexing.py
        full_fence()
        complete = False
        try:
            count = lay.segment_tokens // lay.page_tokens
            table = views.tables[int(job[JOB_TABLE]), int(job[JOB_SEGMENT]) * count :][:count].copy()
            if len(table) < count or table.min() < 0 or table.max() >= lay.pages:
                return  # the request ended
            at_once = self.layers_at_once
            for first in range(0, lay.layers, at_once):
                layers = range(first, min(lay.layers, first + at_once))
                if int(views.generations[slab]) != generation or self._stopping.is_set():
                    return
                self._work.build_layers(layers, self._fetch(table, layers), job, self._copier)
            complete = True
        finally:
            if complete:
                self._copier.then(partial(self._landed, job))
            else:
                self._copier.drain()
                self._busy.discard(slab)

    def _landed(self, job: Job, error: BaseException | None) -> None:
        """The slabs of a build are home, or failed to come. Called by the thread that copies."""
        slab = int(job[JOB_SLAB])
        if error is not None:
            self._queue.put(partial(self._give_up, job, error))
        elif self._wanted(job):
            full_fence()
            self._views.built[slab] = int(job[JOB_GENERATION])
        self._busy.discard(slab)

    def _fetch(self, table: Job, layers: range) -> torch.Tensor:
        """(layers * kv_heads, 2, segment_tokens, d) rows on the device, one copy a page."""
        stage = torch.empty(self._stage_shape(len(table), len(layers)), dtype=self._pages.dtype, device=self._device)
        for place, page in enumerate(table):
            stage[place].copy_(self._pages[int(page), layers.start : layers.stop], non_blocking=True)
        return self._rows(stage)

    def _stage_shape(self, pages: int, layers: int) -> tuple[int, ...]:
        lay = self._layout
        return pages, layers, lay.kv_heads, 2, lay.page_tokens, lay.dim

    @staticmethod
    def _rows(stage: torch.Tensor) -> torch.Tensor:
        return stage.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(0, 1)
