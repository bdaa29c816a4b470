# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama on two ranks and on one; run by test_tensor_parallel.py, on both cores."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.lora_engine import write_model
from tests.e2e.reuse_engine import apart
from vllm_retrieval_attn.bench.decode import _prompt
from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.core.caches import cache_folder

GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False, "logprobs": 2}
LENGTHS = (1500, 5200)
KNOBS = {"host_memory_gb": 0.3, "resident_tokens": 1024, "threads": 1, "answer_timeout_s": 60}
ALL_ROWS = {"rows": 1 << 15, "max_rows": 1 << 15, "candidates": 1 << 14}


def workers() -> list[psutil.Process]:
    """The CPU workers of all ranks."""
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Host")]


ON_CPU: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}


def serve(
    model: Path, ranks: int, knobs: dict[str, Any] | None, kill: bool = False, full: str = "CPU_ATTN", **how: Any
) -> dict[str, Any]:
    """Answers to two prompts at once. kill: one rank's CPU worker, in the middle of them. full: the backend without
    knobs."""
    engine = InProcessEngine(
        str(model), knobs, full if knobs is None else "retrieval", skip_tokenizer_init=True, max_model_len=8192,
        max_num_seqs=4, max_num_batched_tokens=2048, kv_cache_memory_bytes=200_000_000, seed=0,
        enable_prefix_caching=False, tensor_parallel_size=ranks, **(how or ON_CPU),
    )  # fmt: skip
    prompts = [_prompt(length, 1000, length) for length in LENGTHS]
    found: dict[str, Any] = {"workers": len(workers()), "answers": engine.run(prompts, **GREEDY)}
    if kill:
        names = [engine.add(prompt, **GREEDY) for prompt in prompts]
        done: dict[str, list[int]] = {}
        for number, outputs in enumerate(engine.steps()):
            if number == 12:  # both decode
                workers()[0].send_signal(signal.SIGKILL)
            for output in outputs:
                done[output.request_id] = list(output.outputs[0].token_ids)
        found["killed"] = [done[name] for name in names]
        found["again"] = [answer.tokens for answer in engine.run(prompts, **GREEDY)]
    engine.close()
    return found


def apart_by(mine: Any, its: Any) -> list[float]:
    """Largest difference of the log-probabilities that both name, token by token until they part."""
    found = []
    for one, other, token, same in zip(mine.logprobs, its.logprobs, mine.tokens, its.tokens, strict=True):
        found.append(max((abs(one[name] - other[name]) for name in one if name in other), default=99.0))
        if token != same:
            break
    return found


def main() -> None:
    out = Path(sys.argv[1])
    model = out.with_suffix("")
    write_model(model)
    full = serve(model, 1, None)["answers"]
    two = serve(model, 2, {**KNOBS, **ALL_ROWS, "answer_timeout_s": 1.0}, kill=True)
    sampled = []
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))
    for ranks in (1, 2):
        # Where no space of the model is kept yet: one that was learned by other ranks differs in its last bits.
        os.environ["VLLM_RETRIEVAL_CACHE"] = str(out.with_name(f"cache-{ranks}"))
        sampled.append(serve(model, ranks, {**KNOBS, "rows": 128})["answers"])
    told = {
        "workers": two["workers"],
        "apart": [apart(mine, its) for mine, its in zip(two["answers"], full, strict=True)],
        "by": max(max(apart_by(mine, its)) for mine, its in zip(two["answers"], full, strict=True)),
        "killed": two["killed"] == two["again"] == [answer.tokens for answer in two["answers"]],
        "sampled": [apart_by(*pair) for pair in zip(*sampled, strict=True)],
        "sampled_off": max(max(apart_by(mine, its)) for mine, its in zip(sampled[0], full, strict=True)),
        "rows": [[answer.retrieval["rows_read"] for answer in answers] for answers in sampled],
    }  # fmt: skip
    out.write_text(json.dumps(told))
    os._exit(0)


if __name__ == "__main__":
    main()
