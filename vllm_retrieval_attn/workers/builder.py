"""Background threads of an actor that build the indexes of sealed segments of its KV heads.

Jobs come through the shared file (store/indexing.py); nothing waits for a build. A restarted actor goes on where its
count of finished jobs stands.
"""

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vllm_retrieval_attn.index.build import Spaces, build_segment, make_spaces
from vllm_retrieval_attn.index.calibrate import calibrated_share
from vllm_retrieval_attn.index.kernels import BFLOAT16, FLOAT16
from vllm_retrieval_attn.index.segment import HEAD_SHARE, SegmentShape
from vllm_retrieval_attn.store.layout import (
    ACTOR_JOBS,
    ACTOR_SLAB,
    JOB_GENERATION,
    JOB_SEGMENT,
    JOB_SLAB,
    JOB_TABLE,
    JOBS,
    SAMPLES,
    WORD_JOBS,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval")

_POLL_S = 0.02
_NICE = 15
"""Builders give way to everything else on the machine."""


class Builder(threading.Thread):
    """Serves the build queue for one actor.

    Args:
        layout, views: the shared file of the rank. actor: which share of the KV heads. threads: layers built at once.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.
    """

    def __init__(self, layout: Layout, views: Views, actor: int, threads: int, scale: float, share: float) -> None:
        super().__init__(name=f"retrieval-builder-{actor}", daemon=True)
        self._layout, self._views, self._actor = layout, views, actor
        self._scale, self._share = scale, share
        self._shape = SegmentShape(layout.segment_tokens, layout.dim)
        self._heads = list(range(actor, layout.kv_heads, layout.actors))
        dtype = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}.get(layout.dtype_code, torch.float32)
        lay = layout
        self._pages = (
            torch.from_numpy(views.pages)
            .view(dtype)
            .view(lay.pages, lay.layers, lay.kv_heads, 2, lay.page_tokens, lay.dim)
        )
        self._index = torch.from_numpy(views.index8).view(torch.uint8)
        self._workers = ThreadPoolExecutor(threads, initializer=_be_nice)
        self._stopping = threading.Event()
        views.words[views.actor_word(actor, ACTOR_SLAB)] = -1

    def run(self) -> None:
        _be_nice()
        words = self._views.words
        done = self._views.actor_word(self._actor, ACTOR_JOBS)
        while not self._stopping.is_set():
            count = int(words[done])
            if count == int(words[WORD_JOBS]):
                self._stopping.wait(_POLL_S)
                continue
            full_fence()
            try:
                self._serve(self._views.jobs[count % JOBS].copy())
            except Exception:
                # The segment stays sealed and is scanned exactly.
                logger.exception("retrieval: building an index failed")
            words[self._views.actor_word(self._actor, ACTOR_SLAB)] = -1
            words[done] = count + 1

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _serve(self, job: np.ndarray) -> None:
        views, lay = self._views, self._layout
        slab, generation = int(job[JOB_SLAB]), int(job[JOB_GENERATION])
        views.words[views.actor_word(self._actor, ACTOR_SLAB)] = slab
        full_fence()  # before the look at the generation: see store/indexing.py
        count = lay.segment_tokens // lay.page_tokens
        table = int(job[JOB_TABLE])
        pages = views.tables[table, int(job[JOB_SEGMENT]) * count :][:count].copy()
        if pages.min() < 0 or pages.max() >= lay.pages:
            return  # the request ended

        def build(layer: int) -> None:
            if int(views.generations[slab]) == generation and not self._stopping.is_set():
                self._build(layer, torch.from_numpy(pages), table, slab, first=int(job[JOB_SEGMENT]) == 0)

        for future in [self._workers.submit(build, layer) for layer in range(lay.layers)]:
            future.result()
        if int(views.generations[slab]) == generation:
            full_fence()
            views.built[slab, self._actor] = generation

    def _build(self, layer: int, pages: torch.Tensor, table: int, slab: int, first: bool) -> None:
        lay = self._layout
        heads = len(self._heads)
        rows = self._pages[pages, layer][:, self._heads]  # (pages, H, 2, page_tokens, d)
        rows = rows.permute(1, 2, 0, 3, 4).reshape(heads, 2, lay.segment_tokens, lay.dim).float()
        statistics = torch.from_numpy(self._views.statistics[table, layer])[self._heads]
        turns = torch.tensor(
            [((table * lay.layers + layer) * lay.kv_heads + h) * lay.dim * lay.dim for h in self._heads]
        )
        memory = self._index[: lay.slabs_offset - lay.turns_offset].view(torch.bfloat16)
        size = lay.dim * lay.dim
        if first:
            spaces = make_spaces(rows[:, 0], statistics[:, :size].view(heads, lay.dim, lay.dim))
            for turn, matrix in zip(turns.tolist(), spaces.to_queries, strict=True):
                memory[turn : turn + size] = matrix.bfloat16().reshape(-1)
        else:
            spaces = Spaces.of(
                torch.stack([memory[t : t + size].float().view(lay.dim, lay.dim) for t in turns.tolist()])
            )
        base = lay.slabs_offset - lay.turns_offset + slab * lay.segment_slab_bytes
        slabs = torch.empty(heads, lay.slab_bytes, dtype=torch.uint8)
        build_segment(self._shape, rows[:, 0], rows[:, 1], spaces, turns, slabs, self._share or 1.0)
        if not self._share:
            samples = lay.group * SAMPLES
            queries = statistics[:, size : size + samples * lay.dim].view(heads, samples, lay.dim)
            lse = statistics[:, size + samples * lay.dim :][:, :samples]
            shares = calibrated_share(self._shape, slabs, rows[:, 0], spaces, queries * self._scale, lse)
            slabs[:, HEAD_SHARE * 8 : HEAD_SHARE * 8 + 8] = shares.double()[:, None].view(torch.uint8)
        for number, head in enumerate(self._heads):
            begin = base + (layer * lay.kv_heads + head) * lay.slab_bytes
            self._index[begin : begin + lay.slab_bytes] = slabs[number]


def _be_nice() -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
