# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters with what is kept of prompts: run by test_lora.py in a process of its own, by tests/gpu in graphs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.e2e.reuse_engine import apart
from vllm_retrieval_attn.bench.decode import SHAPES, _prompt, write_shape
from vllm_retrieval_attn.bench.engine import InProcessEngine

RANK, NEW, DOCUMENT = 4, 12, 3000
CALLS = [("none", 0), ("a", 0), ("a", 0), ("b", 0), ("a", 1), ("none", 1)]
"""Adapter, and which question on the document, one after the other."""


def write_model(folder: Path) -> None:
    """Random weights, of a size that lets attention decide what comes next; vLLM's dummy ones do not."""
    folder.mkdir()
    write_shape("tiny", folder)
    shape, random = SHAPES["tiny"], torch.Generator().manual_seed(7)
    size, inner, words = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = size // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def made(*of: int) -> torch.Tensor:
        return torch.randn(*of, generator=random) * 0.08

    tensors = {"model.embed_tokens.weight": made(words, size) * 10, "lm_head.weight": made(words, size)}
    tensors["model.norm.weight"] = torch.ones(size)
    for layer in range(shape["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for name, of in {"q": (size, size), "k": (kv, size), "v": (kv, size), "o": (size, size)}.items():
            tensors[f"{base}.self_attn.{name}_proj.weight"] = made(*of) * (3 if name in "vo" else 1)
        for name, of in {"gate": (inner, size), "up": (inner, size), "down": (size, inner)}.items():
            tensors[f"{base}.mlp.{name}_proj.weight"] = made(*of)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{name}.weight"] = torch.ones(size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, seed: int) -> str:
    """A PEFT folder with random matrices for queries, keys and values, large enough to change every answer."""
    shape, random = SHAPES["tiny"], torch.Generator().manual_seed(seed)
    size = shape["hidden_size"]
    head = size // shape["num_attention_heads"]
    sizes = {
        "q_proj": size,
        "k_proj": head * shape["num_key_value_heads"],
        "v_proj": head * shape["num_key_value_heads"],
    }
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, out in sizes.items():
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(RANK, size, generator=random) * 0.1
            tensors[f"{base}.lora_B.weight"] = torch.randn(out, RANK, generator=random)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def answers(folder: Path, backend: str, knobs: dict[str, Any] | None, **how: Any) -> tuple[list[Any], int]:
    """One of each call, then one of each adapter at once; and how many steps were whole CUDA graphs."""
    from vllm.lora.request import LoRARequest

    adapters = {"none": None, **{name: LoRARequest(name, i + 1, str(folder / name)) for i, name in enumerate("ab")}}
    engine = InProcessEngine(
        str(folder / "model"), knobs, backend, skip_tokenizer_init=True,
        max_model_len=8192, max_num_seqs=4, max_num_batched_tokens=1024, seed=0, kv_cache_memory_bytes=100_000_000,
        enable_lora=True, max_loras=2, max_lora_rank=8, enable_prefix_caching=knobs is not None, **how,
    )  # fmt: skip
    sampling = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 2, "detokenize": False}
    plain, found = engine.engine.add_request, []
    for adapter, question in CALLS:
        engine.engine.add_request = lambda *args, adapter=adapter, **more: plain(
            *args, lora_request=adapters[adapter], **more
        )
        prompt = _prompt(DOCUMENT, 1000, 1) + _prompt(60, 1000, 10 + question)
        found += engine.run([prompt], **sampling)
    turns = iter(adapters)
    engine.engine.add_request = lambda *args, **more: plain(*args, lora_request=adapters[next(turns)], **more)
    found += engine.run([_prompt(DOCUMENT, 1000, 2 + number) for number in range(len(adapters))], **sampling)
    graphs = engine.worker().graph_steps if knobs is not None else 0
    engine.close()
    return found, graphs


def compare(folder: Path, backend: str, knobs: dict[str, Any], **how: Any) -> dict[str, Any]:
    """Ours beside full attention. ``folder`` is made."""
    folder.mkdir()
    write_model(folder / "model")
    for seed, name in enumerate("ab"):
        write_adapter(folder / name, seed)
    full, _ = answers(folder, backend, None, **how)
    ours, graphs = answers(folder, "retrieval", {"resident_tokens": 1024, "poison_freed": True, **knobs}, **how)
    return {
        "apart": [apart(mine, its) for mine, its in zip(ours, full, strict=True)],
        "cached": [one.retrieval["cached_tokens"] for one in ours],
        "host": [one.retrieval["host_tokens"] for one in ours],
        "different": len({tuple(full[number].tokens) for number in (0, 1, 3)}),
        "graphs": graphs,
    }


def main() -> None:
    out = Path(sys.argv[1])
    knobs = {"host_memory_gb": 0.2, "index": "flat"}
    told = compare(out.with_suffix(""), "CPU_ATTN", knobs, dtype="float32", enforce_eager=True)
    out.write_text(json.dumps(told))
    os._exit(0)


if __name__ == "__main__":
    main()
