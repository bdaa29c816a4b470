# SPDX-License-Identifier: Apache-2.0
"""Synthetic K and V for requests of any length, so that decode steps can be timed without computing their prompts.

Every page of the arena and of the sketch gets noise once. A request's prompt, but for its last token, then counts as
brought by the connector, and lies wherever its pages do.
"""

from typing import Any

import torch

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.device.decode_step import PAGE

_STEP = 0.3
"""Of the codes: their coordinates then have a deviation of about 1.4."""


def fill(engine: InProcessEngine) -> None:
    """Fill the arena, and the sketch if there is one, and let requests count on it."""
    worker: Any = engine.worker()
    torch.manual_seed(0)
    pages = worker.arena.pages
    if worker.cuda is not None:
        from vllm_retrieval_attn.device.cuda_host import on_gpu

        pages = on_gpu(pages, worker.cuda.device)  # several times as fast as the CPU
    noise = torch.randn(pages.shape[1:]).to(pages.dtype).to(pages.device)
    for page in pages:
        page.copy_(noise)
    if worker.sketch is not None:
        _fill_codes(worker.sketch)
    worker.arena.filled = True
    engine.scheduler.connector.filled = True


def _fill_codes(sketch: Any) -> None:
    geometry = sketch.geometry
    blocks = sketch.pool.view(-1, geometry.block_bytes)
    codes = geometry.block_bytes - 2 * PAGE
    for part in blocks.split(1024):
        part[:, :codes].random_(0, 256)
    blocks[:, codes:].view(torch.float16).fill_(_STEP)
