# SPDX-License-Identifier: Apache-2.0
"""Small random models, one of each family that people serve, on vLLM's backend and on ours: run by test_families.py.

All in one process: vLLM is imported once. tests/gpu takes its hybrid model from here.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from vllm_retrieval_attn.bench.engine import InProcessEngine

BEYOND = 512
"""Tokens from which on positions are scaled, in models that do."""
LENGTHS = (50, 400, 1500)
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 8 * BEYOND, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SCALED = {"rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": BEYOND}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
HYBRID = {"num_hidden_layers": 6, "sliding_window": 64, "query_pre_attn_scalar": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", **SCALED}}),
    "qwen 2.5": ("Qwen2", {}),
    "qwen 3": ("Qwen3", {"head_dim": 64}),
    "qwen 3 moe": ("Qwen3Moe", {"head_dim": 64, **EXPERTS}),
    "mistral": ("Mistral", {"head_dim": 64, "sliding_window": None}),
    "gemma 3": ("Gemma3", {"head_dim": 64, **HYBRID}),
}
"""Name of the classes in transformers, and what differs from SIZES."""
KNOBS = {"host_memory_gb": 0.1, "window_tokens": 64, "sink_tokens": 16, "resident_tokens": 100}
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("CPU_ATTN", None),
    "flat": ("retrieval", {**KNOBS, "index": "flat"}),
    "none": ("retrieval", {**KNOBS, "index": "none"}),
}


def make_model(family: str, folder: Path) -> Path:
    """Weights of a size that lets attention decide what comes next; norms and biases are not what they begin as."""
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**SIZES | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.08
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(folder)
    return folder


def make_starts_fast() -> None:
    """Leave out what takes longer than all engines' answers."""
    from vllm import ModelRegistry

    # vLLM looks at a model's class in a process of its own, for ten seconds, unless it was given the class.
    for name, _ in FAMILIES.values():
        architecture = f"{name}ForCausalLM"
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    # Log-probabilities are ranked by a compiled function.
    torch._dynamo.config.disable = True
    # vLLM collects four times an engine, and each time half a second goes by over what it imported.
    gc.collect = lambda generation=2: 0


def answers(model: Path, backend: str, knobs: dict[str, Any] | None) -> dict[str, Any]:
    # Freed blocks are not poisoned: hybrid models share the pool, and vLLM's CPU kernel reads past the end of a row's
    # last block (weighted with zero, which NaN survives).
    engine = InProcessEngine(
        str(model), knobs, backend, dtype="float32", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=4,
        max_num_batched_tokens=256, kv_cache_memory_bytes=3 * 10**7, enforce_eager=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, length).tolist() for length in LENGTHS]
    told = engine.run(prompts, temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=5)
    config = engine.engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    (parts,) = engine.llm.apply_model(lambda model: {type(part).__name__ for part in model.modules()})
    found = {
        "tokens": [one.tokens for one in told],
        "logprobs": [one.logprobs for one in told],
        "host_tokens": [one.retrieval["host_tokens"] if one.retrieval else 0 for one in told],
        "backends": [layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")],
        "positions": config.model_config.hf_text_config.rope_parameters,
        "parts": sorted(parts),
    }
    engine.close()
    return found


def main(out: Path) -> None:
    make_starts_fast()
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        model = make_model(family, out.with_suffix("") / family)
        found[family] = {way: answers(model, backend, knobs) for way, (backend, knobs) in WAYS.items()}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
