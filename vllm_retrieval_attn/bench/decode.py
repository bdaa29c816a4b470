# SPDX-License-Identifier: Apache-2.0
"""Decode steps of contexts and batches, ours beside full attention in one run: `vllm-retrieval bench decode`.

Dummy weights of a published shape, so that nothing need be downloaded; times do not depend on them.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.fill import fill

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
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
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
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sketch": ("retrieval", {}),
    "faiss": ("retrieval", {"retrieval": {"sketch_gb": 0}}),
    "flat": ("retrieval", {"retrieval": {"index": "flat"}}),
    "none": ("retrieval", {"retrieval": {"index": "none"}}),
    "full": ("FLASH_ATTN", {}),
    "full-fp8": ("FLASH_ATTN", {"kv_cache_dtype": "fp8"}),
    "full-offload": ("FLASH_ATTN", {"kv_offloading_size": 48, "enable_prefix_caching": True}),
}
"""Ways to serve a context: backend, and arguments of ``vllm.LLM``."""
FILLED = ("sketch", "flat")
"""Ways that need nothing but K and V, and codes that bench/fill.py can make up."""
_CHUNK = 8192
"""Tokens of a prefill step."""
_SKIP = 6
"""Decode steps left out of the figures: the first ones meet cold caches, and one batch follows a prefill."""
_LEAST_TAU = 1e-9
"""So low that ``rows`` alone says how many rows are read: dummy weights spread attention evenly."""


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


@dataclass(frozen=True)
class Load:
    """What is measured: ``batch`` equal requests of ``context`` tokens, ``tokens`` decode steps, ``rows`` host rows."""

    context: int
    batch: int
    tokens: int
    rows: int

    @property
    def limit(self) -> int:
        """Tokens of a request: the first one goes on while the prompts of the others are computed."""
        return self.tokens + (self.batch - 1) * -(-self.context // _CHUNK)


def start(shape: str, way: str, loads: Sequence[Load], options: dict[str, Any]) -> InProcessEngine:
    """An engine with dummy weights that has room for all of ``loads``.

    Args:
        options: for ``vllm.LLM`` and, under ``retrieval``, our knobs.
    """
    from vllm.platforms import current_platform

    backend, settings = WAYS[way]
    ours = backend == "retrieval"
    if not ours and current_platform.is_cpu():
        backend = "CPU_ATTN"
    rows = {load.rows for load in loads}
    knobs: dict[str, Any] = {"rows": max(rows), "max_rows": max(4096, *rows), "tau": _LEAST_TAU, "min_tau": _LEAST_TAU}
    knobs["fidelity"] = 0.0  # a step that is compared is no graph
    given = dict(options)
    knobs |= given.pop("retrieval", {})
    changed = dict(settings)
    knobs |= changed.pop("retrieval", {})
    with tempfile.TemporaryDirectory() as folder:
        return InProcessEngine(
            str(write_shape(shape, Path(folder))),
            knobs if ours else None,
            backend,
            **{
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "max_model_len": max(load.context + load.limit for load in loads) + 8,
                "max_num_seqs": max(2, *(load.batch for load in loads)),
                "max_num_batched_tokens": _CHUNK,
                "enable_prefix_caching": False,
                "seed": 0,
                **given,
                **changed,
            },
        )


def measure(engine: InProcessEngine, shape: str, way: str, load: Load) -> dict[str, Any]:
    """One load on an engine of :func:`start`.

    Returns:
        ``ttft_s`` until all requests have their first token; ``step_ms_p50``, ``step_ms_p90``, ``tokens_per_s`` of the
        decode steps after the first _SKIP; ``settled_s`` from the first token until steps take less than 1.5 times the
        median; ``longest_ms`` of all decode steps; ``gpu_bytes``, ``host_bytes`` that the requests hold at the last of
        them; ``rows_mean`` host rows read for a KV head; ``graph``: the share of the timed steps that replayed one
        graph; ``degraded``: steps of the load in which the engine did the CPU workers' part, or these were late;
        ``degraded_share`` of the timed steps. The last four are None without our backend.

        Where there is no memory for all requests at once, ``step_ms_p50`` is None and ``at_once`` how many there is
        memory for; they are ended then.

    Raises:
        ValueError: too few steps.
    """
    import torch

    worker = engine.worker() if WAYS[way][0] == "retrieval" else None
    vocabulary = SHAPES[shape]["vocab_size"]
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": load.limit, "ignore_eos": True, "detokenize": False}
    if worker is not None and way in ("sketch", "faiss"):
        sampling["extra_args"] = {"retrieval_rows": load.rows}
    engine.max_blocks.clear()
    degraded = worker.answers.degraded_steps if worker is not None else 0
    begin = time.perf_counter()
    names = [engine.add(_prompt(load.context, vocabulary, seed), **sampling) for seed in range(load.batch)]
    stamps: list[float] = []
    graphs: list[int] = []
    late_steps: list[int] = []
    counts: dict[str, int] = dict.fromkeys(names, 0)
    reports: list[dict[str, Any]] = []
    held, at_once = {"gpu_bytes": 0, "host_bytes": 0}, 0
    for outputs in engine.steps():
        for output in outputs:
            counts[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished and (output.kv_transfer_params or {}).get("retrieval"):
                reports.append(output.kv_transfer_params["retrieval"])
        at_once = max(at_once, sum(0 < count < load.limit for count in counts.values()))
        if min(counts.values()) == 0 and max(counts.values()) == load.limit:
            engine.engine.abort_request(names)
            break
        if min(counts.values()) == 0 or max(counts.values()) == load.limit or len(stamps) == load.tokens:
            continue
        stamps.append(time.perf_counter() - begin)
        graphs.append(worker.graph_steps if worker is not None else 0)
        late_steps.append(worker.answers.degraded_steps if worker is not None else 0)
        held = _held(engine, worker)  # the first steps still hold blocks of the prompt that are in flight
    engine.drain()
    every = [b - a for a, b in itertools.pairwise(stamps)]
    steps = every[_SKIP:]
    told = {"backend": WAYS[way][0], "way": way, "shape": shape, "context": load.context, "batch": load.batch}
    if not stamps:
        return {**told, "step_ms_p50": None, "at_once": at_once}
    if not steps:
        raise ValueError(f"{load.tokens} decode steps are too few; {_SKIP + 3} at least")
    median = statistics.median(steps)
    late = [i for i, step in enumerate(every) if step > 1.5 * median]
    return {
        **told,
        "rows": load.rows,
        "ttft_s": round(stamps[0], 3),
        "step_ms_p50": round(median * 1e3, 3),
        "step_ms_p90": round(sorted(steps)[len(steps) * 9 // 10] * 1e3, 3),
        "tokens_per_s": round(load.batch / median, 1),
        "settled_s": round(sum(every[: late[-1] + 1]), 3) if late else 0.0,
        "longest_ms": round(max(every) * 1e3, 1),
        **held,
        "rows_mean": round(statistics.mean(report["rows_read"] for report in reports), 1) if reports else None,
        "path": "/".join(sorted({report["path"] for report in reports})) or None,
        "graph": round((graphs[-1] - graphs[_SKIP]) / len(steps), 3) if worker is not None else None,
        "degraded": worker.answers.degraded_steps - degraded if worker is not None else None,
        "degraded_share": round((late_steps[-1] - late_steps[_SKIP]) / len(steps), 3) if worker is not None else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _held(engine: InProcessEngine, worker: Any) -> dict[str, int]:
    """Bytes of the live requests: of pages and codes on the GPU, and of the arena."""
    config = engine.scheduler.kv_cache_config
    sizes = [group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in config.kv_cache_groups]
    paged = sum(blocks * size for row in engine.held_blocks().values() for blocks, size in zip(row, sizes, strict=True))
    if worker is None or not worker.hosted:
        return {"gpu_bytes": paged, "host_bytes": 0}
    codes = worker.sketch.codes.used * worker.sketch.geometry.sketch_page_bytes if worker.sketch is not None else 0
    return {"gpu_bytes": paged + codes, "host_bytes": worker.arena.used_bytes}


def compare(
    shape: str, ways: Sequence[str], loads: Sequence[Load], options: dict[str, Any], filled: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of :func:`measure`, way after way, each in an engine of its own.

    Args:
        filled: the sketch's prompts are not computed, see bench/fill.py.
    """
    for way in ways:
        engine = start(shape, way, loads, options)
        try:
            if filled and way in FILLED:
                fill(engine)
            engine.run(
                [_prompt(1024, SHAPES[shape]["vocab_size"])],
                temperature=0,
                max_tokens=8,
                ignore_eos=True,
                detokenize=False,
            )
            for load in loads:
                yield measure(engine, shape, way, load)
        finally:
            engine.close()
            del engine
            _give_back()


def _give_back() -> None:
    """What an engine held, so that the next one finds the device free."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _prompt(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    import numpy as np

    return [int(token) for token in np.random.default_rng(seed).integers(10, vocabulary - 10, length)]
