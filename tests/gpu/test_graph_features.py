# SPDX-License-Identifier: Apache-2.0
"""What a server meets besides plain batches, in decode steps that are whole CUDA graphs: preemption, n > 1, aborts, a
hybrid model. All rows are read, so that answers are full attention's."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import families
from tests.e2e.lora_engine import write_model
from tests.e2e.reuse_engine import apart
from vllm_retrieval_attn.bench.decode import _prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PROMPT, NEW = 6200, 120
"""Six host pages of 1,024 tokens, and a seventh after some steps."""
PAGES = 25
"""Four such requests, and one page more: who grows first takes it, the next one preempts another."""
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False, "logprobs": 2}


def run(model: Path, backend: str, knobs: dict[str, Any] | None, **how: Any) -> dict[str, Any]:
    """Answers of four requests at once, of one that asks for two, and of two while a third is aborted."""
    from vllm_retrieval_attn.bench.engine import InProcessEngine

    engine = InProcessEngine(
        str(model), knobs, backend, skip_tokenizer_init=True, max_model_len=8192, max_num_seqs=8, seed=0,
        max_num_batched_tokens=2048, kv_cache_memory_bytes=200_000_000, enable_prefix_caching=False, **how,
    )  # fmt: skip
    prompts = [_prompt(PROMPT, 1000, seed) for seed in range(4)]
    preempted, scheduler = [], engine.scheduler
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **more: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **more)

    scheduler._preempt_request = preempt
    found: dict[str, Any] = {"many": engine.run(prompts, **GREEDY), "preempted": len(preempted)}
    name = engine.add(prompts[0], **{**GREEDY, "n": 2, "max_tokens": 20, "temperature": 1.0, "top_k": 1})
    found["two"] = {}
    for outputs in engine.steps():
        for output in outputs:
            found["two"].update({one.index: list(one.token_ids) for one in output.outputs})
    names = [engine.add(prompt, **{**GREEDY, "max_tokens": 40}) for prompt in prompts[:3]]
    found["beside"] = {}
    for number, outputs in enumerate(engine.steps()):
        if number == 25:
            engine.engine.abort_request([names[1]])
        for output in outputs:
            found["beside"][names.index(output.request_id)] = list(output.outputs[0].token_ids)
    engine.drain()
    assert name not in engine.held_blocks()
    if knobs is not None:
        worker = engine.worker()
        found |= {"graphs": worker.graph_steps, "left": worker.arena.used_pages}
    engine.close()
    del engine
    gc.collect()
    return found


def check(full: dict[str, Any], ours: dict[str, Any], most_apart: int) -> None:
    """``most_apart``: answers that may part for more than a tie; 0 in 32 bits."""
    assert full["preempted"] == 0 < ours["preempted"]
    assert sum(apart(mine, its) for mine, its in zip(ours["many"], full["many"], strict=True)) <= most_apart
    assert len(ours["two"]) == 2
    assert ours["two"][0] == ours["two"][1]
    aborted = len(ours["beside"].pop(1))
    assert 0 < aborted < 40
    full["beside"].pop(1)
    differ = [ours["beside"][number] != tokens for number, tokens in full["beside"].items()]
    assert sum(differ) <= most_apart
    assert ours["left"] == 0


def test_preemption_several_answers_and_aborts(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    write_model(tmp_path / "model")
    full = run(tmp_path / "model", "FLASH_ATTN", None, dtype="bfloat16")
    cleanup_dist_env_and_memory()
    per_page = 1024 * 2 * 2 * (2 * 64 * 2 + 66)  # layers, KV heads; K and V, and a code
    memory = (PAGES + 0.5) * per_page / 1e9
    knobs = {"host_memory_gb": memory, "rows": 1 << 15, "max_rows": 1 << 15, "poison_freed": True}
    ours = run(tmp_path / "model", "retrieval", knobs, dtype="bfloat16")
    check(full, ours, most_apart=1)
    assert ours["graphs"] > NEW


def test_a_hybrid_model(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_retrieval_attn.bench.engine import InProcessEngine

    folder = families.make_model("gemma 3", tmp_path / "hybrid")
    knobs = {
        "host_memory_gb": 0.1, "window_tokens": 64, "sink_tokens": 16, "resident_tokens": 100, "rows": 1 << 15,
        "max_rows": 1 << 15,
    }  # fmt: skip
    prompts = [[3 + word % 490 for word in _prompt(length, 1000, length)] for length in (50, 400, 3000)]
    found, graphs = [], 0
    for backend, given in (("FLASH_ATTN", None), ("retrieval", knobs)):
        engine = InProcessEngine(
            str(folder), given, backend, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=4096,
            max_num_batched_tokens=512, max_num_seqs=4, kv_cache_memory_bytes=2 * 10**8,
        )  # fmt: skip
        found.append(engine.run(prompts, **{**GREEDY, "max_tokens": 24}))
        graphs = engine.worker().graph_steps if given else 0
        engine.close()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    assert graphs > 12
    assert sum(apart(mine, its) for mine, its in zip(found[1], found[0], strict=True)) <= 1
