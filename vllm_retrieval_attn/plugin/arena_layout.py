# SPDX-License-Identifier: Apache-2.0
"""What the arena of a rank looks like, from vLLM's config and ours."""

from typing import TYPE_CHECKING

import torch

from vllm_retrieval_attn.index.rows import DTYPE_CODES
from vllm_retrieval_attn.index.scan import CAN_SCAN
from vllm_retrieval_attn.plugin.spec import RetrievalSpec
from vllm_retrieval_attn.store.layout import Layout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_retrieval_attn.core.config import ResolvedConfig


def retrieval_layers(kv_cache_config: "KVCacheConfig") -> dict[str, RetrievalSpec]:
    """Names and specs of the layers that use our backend, in the model's order."""
    layers: dict[str, RetrievalSpec] = {}
    for group in kv_cache_config.kv_cache_groups:
        if isinstance(group.kv_cache_spec, RetrievalSpec):
            layers.update((name, group.kv_cache_spec) for name in group.layer_names)
    return layers


def with_block_size(config: "ResolvedConfig", kv_cache_config: "KVCacheConfig") -> "ResolvedConfig":
    """The knobs with the block size that vLLM settled on for our layers (it may grow in hybrid models)."""
    specs = list(retrieval_layers(kv_cache_config).values())
    if not specs:
        raise ValueError("retrieval: this model has no full-attention layer; serve it without this backend")
    return config.model_copy(update={"block_size": specs[0].block_size})


def arena_layout(
    vllm_config: "VllmConfig", config: "ResolvedConfig", layers: dict[str, RetrievalSpec], heads: int
) -> tuple[torch.dtype, Layout]:
    """The arena's element type and its shapes.

    Args:
        layers: see retrieval_layers. heads: query heads of this rank.

    Raises:
        ValueError: the layers are not alike, or keep other bytes than the model's config lets expect.
    """
    specs = set(layers.values())
    if len(specs) != 1:
        raise ValueError("retrieval: full-attention layers of different shapes are not supported")
    (spec,) = specs
    itemsize = torch.empty((), dtype=spec.dtype).element_size()
    per_token = len(layers) * spec.num_kv_heads * 2 * spec.head_size * itemsize
    if per_token != config.bytes_per_token:
        raise ValueError(
            f"retrieval: the model keeps {per_token} bytes a token in {len(layers)} layers, "
            f"{config.bytes_per_token} were expected from its config; this model's layout is not supported"
        )
    max_len = vllm_config.model_config.max_model_len
    return spec.dtype, Layout(
        layers=len(layers),
        heads=heads,
        kv_heads=spec.num_kv_heads,
        dim=spec.head_size,
        itemsize=itemsize,
        dtype_code=DTYPE_CODES[str(spec.dtype).removeprefix("torch.")],
        page_tokens=config.page_tokens,
        pages=config.arena_pages,
        max_rows=vllm_config.scheduler_config.max_num_seqs,
        table_pages=min(config.host_pages, -(-max_len // config.page_tokens)) + 1,
        actors=config.workers,
        threads=config.threads,
        most_limit=config.max_rows,
        first_head=vllm_config.parallel_config.rank * spec.num_kv_heads,
        indexed=config.index == "attention",
    )


def summary(config: "ResolvedConfig", layout: Layout) -> str:
    """Arena and workers in a few words, for the log."""
    scored = f", codes scored by {'AVX-512 VNNI' if CAN_SCAN and config.scan == 'auto' else 'Faiss'}"
    return (
        f"{layout.pages * layout.page_bytes / 1e9:.1f} GB ({config.host_tokens} tokens, "
        f"{config.bytes_per_token / 1e3:.1f} KB each), {layout.actors} workers x {layout.threads} threads"
        f"{scored if layout.indexed else ''}"
    )
