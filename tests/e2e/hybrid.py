"""A small random Gemma 3 (five sliding-window layers to a global one) on one backend; run by test_hybrid.py."""

import json
import sys
from pathlib import Path

import numpy as np

from vllm_retrieval_attn.bench.engine import InProcessEngine


def make_model(folder: Path) -> Path:
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=64,
        max_position_embeddings=8192,
        query_pre_attn_scalar=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert config.layer_types.count("full_attention") == 1
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def main(folder: Path, out: Path, backend: str) -> None:
    engine = InProcessEngine(
        str(folder),
        # Freed blocks are not poisoned: the pool is shared, and vLLM's CPU kernel reads past the end of a row's
        # last block (weighted with zero, which NaN survives).
        {"host_memory_gb": 0.1, "window_tokens": 64, "sink_tokens": 16, "resident_tokens": 100, "index": "flat"}
        if backend == "retrieval"
        else None,
        backend,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=2 * 10**8,
        enforce_eager=True,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, n).tolist() for n in (50, 400, 1500)]
    answers = engine.run(prompts, temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    kinds = {}
    for name, layer in engine.engine.vllm_config.compilation_config.static_forward_context.items():
        kinds[name] = layer.attn_backend.get_name()
    out.write_text(json.dumps({"tokens": [answer.tokens for answer in answers], "backends": kinds}))
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
