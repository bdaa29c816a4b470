# SPDX-License-Identifier: Apache-2.0
"""One engine with the default index: run by test_index.py in a process of its own."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.core.caches import cache_folder
from vllm_retrieval_attn.demo import DOCUMENTS
from vllm_retrieval_attn.evaluation.needles import filler, questions


def disturbed(engine: InProcessEngine, asked: list, greedy: dict) -> list[bool]:
    """Which questions are answered right while other requests come, are indexed and are aborted at random."""
    chance = random.Random(3)
    questions = {engine.add(question.prompt, **greedy): question for question in asked}
    right = dict.fromkeys(questions, False)
    others: dict[str, int] = {}
    for step, outputs in enumerate(engine.steps()):
        for output in outputs:
            if output.request_id in questions:
                right[output.request_id] = questions[output.request_id].number in output.outputs[0].text
        for name in [name for name, until in others.items() if until <= step]:
            engine.engine.abort_request([name])
            del others[name]
        if len(others) < 2 and step < 40:
            tokens = asked[0].prompt[: chance.randrange(700, 2500)]
            name = engine.add(tokens, temperature=0, max_tokens=200, ignore_eos=True)
            others[name] = step + chance.randrange(1, 12)
    engine.drain()
    return list(right.values())


def main(out: Path) -> None:
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))  # what is compiled is the same for all
    os.environ["VLLM_RETRIEVAL_CACHE"] = str(out.parent / "cache")  # no space is known at the start
    model = str(smollm2())
    knobs = {"host_memory_gb": 1, "resident_tokens": 1024, "rows": 512, "poison_freed": True, "fidelity": 0.1,
             "answer_timeout_s": 60}  # fmt: skip
    engine = InProcessEngine(
        model,
        knobs,
        max_model_len=8192,
        max_num_batched_tokens=1024,
        max_num_seqs=4,
        kv_cache_memory_bytes=600_000_000,
        enforce_eager=True,
        seed=0,
    )
    greedy = {"temperature": 0, "max_tokens": 28}
    tokenizer = engine.llm.get_tokenizer()
    asked = [question for length, seed in DOCUMENTS for question in questions(tokenizer, length, 1, seed)]
    found = {"restarted": None}
    answers = [engine.run([question.prompt], **greedy)[0] for question in asked]
    found["right"] = [question.number in answer.text for question, answer in zip(asked, answers, strict=True)]
    prompt, sampled = asked[0].prompt, answers[0]
    # Computed anew: what is reused has prefill go in other pieces, which are rounded otherwise.
    again = engine.run([prompt], skip_reading_prefix_cache=True, **greedy)[0]
    found["again"] = again.tokens == sampled.tokens
    exact = [engine.run([q.prompt], extra_args={"retrieval_exact": True}, **greedy)[0].text for q in asked]
    found["exact_right"] = [question.number in text for question, text in zip(asked, exact, strict=True)]
    # Steps without the worker are exact, later ones find indexes that are made again from the pages.
    name = engine.add(prompt, **greedy)
    for outputs in engine.steps():
        for output in outputs:
            if output.request_id == name and len(output.outputs[0].token_ids) == 3:
                os.kill(engine.worker().stats()["actor_pids"][0], signal.SIGKILL)
            found["restarted"] = asked[0].number in output.outputs[0].text
    engine.drain()
    deadline = time.monotonic() + 10
    while engine.worker().stats()["restarts"] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    found["disturbed"] = disturbed(engine, asked[:1], greedy)
    for _ in range(20):  # a comparison lives no longer than its request
        if engine.worker().stats()["probes"] >= 3:
            break
        engine.run([prompt], **greedy)
    stats = engine.worker().stats()
    found |= {key: stats[key] for key in ("restarts", "fidelity", "space")}
    # A prompt of 4,096 tokens teaches the model's space; it is kept for the next start.
    long = engine.add(tokenizer.encode(filler()[:40_000])[:5000], temperature=0, max_tokens=2)
    for outputs in engine.steps():
        assert {output.request_id for output in outputs} <= {long}
    engine.drain()
    found["space_after"] = engine.worker().stats()["space"]
    found["learned"] = [path.name for path in (out.parent / "cache/spaces").iterdir()]
    found["right_after"] = asked[0].number in engine.run([prompt], **greedy)[0].text
    found["left"] = {key: engine.worker().stats()[key] for key in ("host_bytes", "index_bytes", "requests")}
    engine.close()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
