"""Decode latency at a context length, with a breakdown per layer: `vllm-retrieval bench`.

Dummy weights of a published shape, so that nothing need be downloaded; times do not depend on them.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_retrieval_attn.bench.engine import InProcessEngine

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "rope_theta": 10000.0,
    },
}
MODES = ("full", "attention", "flat", "none")
_SKIP = 4
"""Decode steps left out of the median: the first ones meet cold caches."""


def write_shape(name: str, folder: Path) -> Path:
    """A model folder with nothing but a config."""
    config = {
        "hidden_act": "silu",
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SHAPES[name],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(
    shape: str, mode: str, lengths: list[int], tokens: int = 32, batch: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """TTFT, TPOT and the decode breakdown of one mode at each prompt length.

    Args:
        mode: ``full`` (vLLM's own backend on this device) or a kind of index.
        tokens: output tokens. batch: equal requests at once.
        options: for ``vllm.LLM`` and, under ``retrieval``, our knobs.

    Returns:
        One row a length: ``ttft_s`` in seconds; ``tpot_ms``, median, and ``tpot_ms_p90`` in milliseconds;
        ``settled_s``: seconds from the first token until steps take less than 1.5 times the median; ``*_us`` in
        microseconds a layer.
    """
    import torch
    from vllm.platforms import current_platform

    knobs = options.pop("retrieval", {})
    backend = "retrieval" if mode != "full" else ("CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN")
    with tempfile.TemporaryDirectory() as folder:
        engine = InProcessEngine(
            str(write_shape(shape, Path(folder))),
            {**knobs, "index": mode} if mode != "full" else None,
            backend,
            **{
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "max_model_len": max(lengths) + tokens + 8,
                "max_num_seqs": max(batch, 2),
                "max_num_batched_tokens": 8192,
                "enable_prefix_caching": False,
                "seed": 0,
                **options,
            },
        )
    vocabulary = SHAPES[shape]["vocab_size"]
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    engine.run([_prompt(1024, vocabulary)], **sampling)  # warm-up
    rows = []
    for length in lengths:
        engine.max_blocks.clear()
        worker = engine.worker() if mode != "full" else None
        if worker is not None:
            worker.stats()
        begin = time.perf_counter()
        names = [engine.add(_prompt(length, vocabulary, seed), **sampling) for seed in range(batch)]
        stamps: list[float] = []
        counts: dict[str, int] = dict.fromkeys(names, 0)
        host_bytes = host_tokens = index_bytes = 0
        for outputs in engine.steps():
            stamps.append(time.perf_counter() - begin)
            for output in outputs:
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if min(counts.values()) == 0:
                ttft = stamps[-1]
                stamps.clear()
            elif worker is not None and worker.hosted:
                host_bytes = max(host_bytes, worker.arena.used_bytes)
                host_tokens = max(host_tokens, worker.arena.host_tokens)
                index_bytes = max(index_bytes, worker.arena.indexed_tokens * worker.config.index_bytes_per_token)
        engine.drain()
        ttft = stamps[0] if stamps else ttft
        every = [b - a for a, b in itertools.pairwise(stamps)]
        steps = every[_SKIP:]
        late = [i for i, step in enumerate(every) if step > 1.5 * statistics.median(steps)]
        row: dict[str, Any] = {
            "mode": mode,
            "shape": shape,
            "batch": batch,
            "prompt_tokens": length,
            "ttft_s": round(ttft, 3),
            "tpot_ms": round(statistics.median(steps) * 1e3, 3),
            "tpot_ms_p90": round(sorted(steps)[len(steps) * 9 // 10] * 1e3, 3),
            "settled_s": round(sum(every[: late[-1] + 1]), 3) if late else 0.0,
            "paged_blocks": max(engine.max_blocks.values()),
            "host_bytes": host_bytes,
            "host_tokens": host_tokens,
            "index_bytes": index_bytes,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        if worker is not None:
            timings = worker.stats()["timings"]
            layers = max(timings["layers"], 1)
            for part in ("query_out", "wait", "search", "merge", "total"):
                row[f"{part}_us"] = round(timings[part] / layers / 1e3, 1)
            row["codes_per_layer"], row["rows_per_layer"] = timings["codes"] // layers, timings["rows"] // layers
        rows.append(row)
        print(json.dumps(row), flush=True)
    engine.close()
    return rows


def _prompt(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    import numpy as np

    return [int(token) for token in np.random.default_rng(seed).integers(10, vocabulary - 10, length)]
