# SPDX-License-Identifier: Apache-2.0
"""What a model needs at a context length, and what to set."""

from dataclasses import dataclass
from typing import Any

from vllm_retrieval_attn.core.config import GB, RetrievalConfig, default_host_memory_gb, default_threads
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.device.decode_step import code_bytes
from vllm_retrieval_attn.index.packing import bytes_per_key


@dataclass
class ModelShape:
    """What a model keeps for each token, on one rank."""

    layers: int
    kv_heads: int
    head_size: int
    itemsize: int

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * 2 * self.head_size * self.itemsize


def model_shape(model: str, ranks: int) -> ModelShape:
    """Read a model's shape from its config (a folder, or a name on the hub)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    layers = sum(kind == "full_attention" for kind in kinds) if kinds else text.num_hidden_layers
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = 4 if str(getattr(text, "dtype", "")).endswith("float32") else 2
    return ModelShape(layers, max(1, kv_heads // ranks), head_size, itemsize)


def needs(
    shape: ModelShape,
    context: int,
    requests: int,
    ranks: int,
    block_size: int,
    chunk_tokens: int,
    knobs: RetrievalConfig,
) -> dict[str, float]:
    """Memory, in 10^9 bytes, for ``requests`` requests of ``context`` tokens.

    Returns:
        ``full_gb``: KV cache of full attention on each GPU; ``paged_gb``: our bound on each GPU; ``codes_gb``: codes
        of all host keys on each GPU; ``host_gb``: host memory of the whole engine, with indexes.
    """
    # Two batches may be in flight with async scheduling.
    split = Split(knobs.sink_tokens, knobs.window_tokens, knobs.resident_tokens, block_size)
    blocks = split.blocks_bound(2 * chunk_tokens)
    paged = min(blocks * block_size, context)
    host = max(0, context - knobs.sink_tokens)
    heads = shape.layers * shape.kv_heads if knobs.index == "attention" else 0
    return {
        "full_gb": requests * context * shape.bytes_per_token / GB,
        "paged_gb": requests * paged * shape.bytes_per_token / GB,
        "codes_gb": requests * host * heads * code_bytes(shape.head_size) / GB,
        "host_gb": ranks * requests * host * (shape.bytes_per_token + heads * bytes_per_key(shape.head_size)) / GB,
    }


def advice(need: dict[str, float], context: int, cores: int, ranks: int) -> list[str]:
    """What to set, and what is in the way."""
    host = default_host_memory_gb()
    lines = []
    if need["host_gb"] > host:
        lines.append(
            f"host memory: {need['host_gb']:.1f} GB are needed and {host:.1f} GB can be taken; shorten the context, "
            "serve fewer requests at once, or use a machine with more memory"
        )
    else:
        lines.append(f"set host_memory_gb to at least {need['host_gb']:.1f} (default on this machine: {host:.1f})")
    lines.append(f"search threads: {default_threads(cores, ranks, 1)} in each worker by default")
    lines.append(f"start with: vllm serve MODEL --attention-backend retrieval --max-model-len {context}")
    return lines
