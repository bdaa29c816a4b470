# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens and log-probabilities of one engine over prompts of several lengths: run by test_parity.py, one
process an engine."""

import json
import sys
from pathlib import Path
from typing import Any

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.evaluation.needles import filler

LENGTHS = [100, 700, 3000, 7500]


def as_told(answers: list[Any]) -> dict[str, Any]:
    return {"tokens": [one.tokens for one in answers], "logprobs": [one.logprobs for one in answers]}


def main(out: Path, backend: str, chunk: int) -> None:
    engine = InProcessEngine(
        str(smollm2()),
        {"host_memory_gb": 1, "index": "flat", "resident_tokens": 1024} if backend == "retrieval" else None,
        backend,
        dtype="float32",
        max_model_len=8192,
        max_num_batched_tokens=chunk,
        max_num_seqs=8,
        kv_cache_memory_bytes=10**9,
        enforce_eager=True,
        seed=0,
    )
    ids = engine.llm.get_tokenizer().encode(filler()[:120_000])
    prompts = [ids[10 * n : 10 * n + length] for n, length in enumerate([*LENGTHS, 150, 300, 400, 650])]
    greedy = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "logprobs": 5}
    told = {"together": as_told(engine.run(prompts, **greedy))}
    if backend == "retrieval":
        # Alone in small chunks the longest takes a minute and shows nothing that it does not show together.
        alone = len(LENGTHS) - (chunk < 1024)
        told["alone"] = as_told([engine.run([prompt], **greedy)[0] for prompt in prompts[:alone]])
    engine.close()
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
