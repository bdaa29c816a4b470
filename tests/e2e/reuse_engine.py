# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin alike, on one engine: run by test_reuse.py in a process of its own."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.core.caches import cache_folder
from vllm_retrieval_attn.evaluation.needles import filler

NEW = 16
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 2}
LONG = 7800


def apart(one: Any, other: Any) -> bool:
    """Whether greedy tokens part where they are no tie. Other rows may be drawn (codes of another space), and logits
    of 20, as here, are 0.125 apart in bfloat16."""
    for mine, theirs, row in zip(one.tokens, other.tokens, other.logprobs, strict=False):
        if mine != theirs:
            return abs(row.get(mine, -99.0) - row[theirs]) > 0.15
    return len(one.tokens) != len(other.tokens)


class Cases:
    """Runs requests with what is kept and without."""

    def __init__(self, engine: InProcessEngine) -> None:
        self.engine, self.salts = engine, 0
        self.found: dict[str, Any] = {}

    def run(self, prompts: list[list[int]], salt: str = "", **sampling: Any) -> list[Any]:
        engine = self.engine
        plain = engine.engine.add_request

        def salted(name: str, prompt: dict[str, Any], *args: Any, **more: Any) -> Any:
            return plain(name, {**prompt, **({"cache_salt": salt} if salt else {})}, *args, **more)

        engine.engine.add_request = salted
        try:
            return engine.run(prompts, **{**GREEDY, **sampling})
        finally:
            engine.engine.add_request = plain

    def alone(self, prompt: list[int], **sampling: Any) -> Any:
        """Without anything kept: under a salt of its own."""
        self.salts += 1
        return self.run([prompt], f"alone {self.salts}", **sampling)[0]

    def case(self, name: str, prompts: list[list[int]], together: bool = False, **sampling: Any) -> list[Any]:
        """Prompts one after the other or at once; each is compared with the same alone."""
        if together:
            answers = self.run(prompts, **sampling)
        else:
            answers = [self.run([prompt], **sampling)[0] for prompt in prompts]
        differ = [
            apart(answer, self.alone(prompt, **sampling)) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        cached = [answer.retrieval["cached_tokens"] for answer in answers]
        self.found[name] = {"cached": cached, "prompts": list(map(len, prompts)), "differ": differ}
        return answers


def main(out: Path) -> None:
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))  # what is compiled is the same for all
    os.environ["VLLM_RETRIEVAL_CACHE"] = str(out.parent / "reuse-cache")  # a space is learned meanwhile
    knobs = {
        "host_memory_gb": 1.6, "resident_tokens": 1024, "rows": 512, "poison_freed": True, "fidelity": 0.0,
        "scan": "faiss", "answer_timeout_s": 60,
    }  # fmt: skip
    engine = InProcessEngine(
        str(smollm2()), knobs, max_model_len=8192, max_num_batched_tokens=2048, max_num_seqs=4, block_size=16,
        kv_cache_memory_bytes=600_000_000, enforce_eager=True, seed=0,
    )  # fmt: skip
    tokens = engine.llm.get_tokenizer().encode(filler()[:200_000])
    document, other = tokens[:3000], tokens[9000:11_000]
    questions = [tokens[start : start + 40] for start in (4000, 5000, 6000, 7000)]
    cases = Cases(engine)
    first = cases.case("second turn", [document])[0]
    turn = document + first.tokens + questions[0]
    cases.case("second turn", [turn])
    cases.case("A-B-A", [document[:2000] + questions[1], other, document[:2000] + questions[1]])
    shared = tokens[12_000:14_500]
    cases.case("at once", [shared + question for question in questions], together=True)
    cases.case("exact", [shared + questions[0]], extra_args={"retrieval_exact": True})
    cases.case("short", [document[:600] + questions[0], document[:600] + questions[1]])
    # A prompt that teaches the model's space, and the same one again, coded in the rotation and then in the space.
    long = tokens[20_000 : 20_000 + LONG]
    begin = time.monotonic()
    one = cases.run([long + questions[0]], max_tokens=1)[0]
    stats = engine.worker().stats()
    two = cases.run([long + questions[1]], max_tokens=1)[0]
    cases.found["long"] = {
        "first_s": one.times[0], "second_s": two.times[0], "cached": two.retrieval["cached_tokens"],
        "prompt": len(long) + 40, "space": stats["space"], "seconds": time.monotonic() - begin,
    }  # fmt: skip
    cases.case("learned meanwhile", [long[:4000] + questions[2]])
    prefixes = engine.scheduler.connector._ledger.prefixes
    cases.found["left"] = {
        "idle": len(prefixes.idle), "kept": len(prefixes.kept), "live": engine.worker().stats()["host_pages"],
    }  # fmt: skip
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    cases.case("reset", [document])
    engine.close()
    out.write_text(json.dumps(cases.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
