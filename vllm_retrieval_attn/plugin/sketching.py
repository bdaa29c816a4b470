# SPDX-License-Identifier: Apache-2.0
"""Taking the sketch's memory at model load."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from vllm_retrieval_attn.plugin.resolved import resolved_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SHARES = 4
"""Requests that share pages have so many times as many of them together as there are. Scores of a step take 64 bytes of
GPU memory a token; where it is not enough, a request is searched by the CPU workers."""

logger = logging.getLogger("vllm.retrieval")


def _least_of_ranks(pages: int, ranks: int) -> int:
    """What every tensor-parallel rank has room for: all must agree on which requests have codes."""
    if ranks == 1:
        return pages
    from vllm.distributed import get_tp_group

    least = torch.tensor([pages])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return int(least)


def load_sketch(vllm_config: "VllmConfig", layer: Any) -> None:
    """Take the memory and load the kernels of this process's sketch, once; nothing if the knobs want none.

    Args:
        layer: a retrieval layer's implementation, for its shapes.
    """
    from vllm_retrieval_attn.device.decode_step import Geometry, most_entries
    from vllm_retrieval_attn.device.sketch import Sketch, current_sketch, keep_sketch, pages_for

    config = resolved_config(vllm_config)
    if not config.sketches or current_sketch() is not None:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    free = torch.cuda.mem_get_info(device)[0]
    limit = None if config.sketch_gb is None else config.sketch_gb * 1e9

    shares = SHARES if vllm_config.cache_config.enable_prefix_caching else 1

    def geometry(pages: int) -> Geometry:
        return Geometry(
            layers=config.layers,
            kv_heads=layer.num_kv_heads,
            group=layer.num_heads // layer.num_kv_heads,
            dim=layer.head_size,
            dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
            rows=vllm_config.scheduler_config.max_num_seqs,
            entries=most_entries(shares * pages, vllm_config.scheduler_config.max_num_seqs),
            host_pages=config.arena_pages,
            sketch_pages=pages,
            scale=layer.scale,
            first_head=vllm_config.parallel_config.rank * layer.num_kv_heads,
        )

    try:
        pages = pages_for(geometry(1), config.host_pages, limit, free)
    except ValueError as error:  # a shape that the kernels are not written for
        raise ValueError(f"retrieval: {error}; set sketch_gb to 0, so that the CPU searches alone") from None
    pages = _least_of_ranks(pages, config.ranks)
    sketch = Sketch(geometry(pages), device, shares * pages)
    keep_sketch(sketch)
    logger.info(
        "retrieval: codes of %d host tokens take %.2f GB of the GPU, and %.2f GB beside; host memory holds %d tokens",
        sketch.codes.pages * config.page_tokens,
        sketch.codes.pages * sketch.geometry.sketch_page_bytes / 1e9,
        sketch.bytes / 1e9,
        config.host_tokens,
    )
