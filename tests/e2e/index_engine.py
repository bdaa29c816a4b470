"""One engine with the default index over short segments: run by test_index.py in a process of its own."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.bench.needles import questions
from vllm_retrieval_attn.demo import DOCUMENTS


def disturbed(engine: InProcessEngine, asked: list, greedy: dict) -> list[bool]:
    """Which questions are answered right while other requests come, are indexed and are aborted at random."""
    chance = random.Random(3)
    engine._settle = "never"  # builds run beside
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
    engine = InProcessEngine(
        str(smollm2()),
        {"segment_tokens": 512, "host_memory_gb": 1, "poison_freed": True, "fidelity": 0.1},
        settle="steps",
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
    found["indexed"] = engine.worker().stats()["segments_indexed"]
    # A budget of 1 is exact attention, whatever the index holds.
    prompt, indexed = asked[0].prompt, answers[0]
    exact = engine.run([prompt], extra_args={"retrieval_budget": 1.0}, **greedy)[0]
    found["exact_right"] = asked[0].number in exact.text
    found["same"] = indexed.tokens == exact.tokens
    # The index lies in shared memory: a worker that dies while decoding takes nothing of it along.
    name = engine.add(prompt, **greedy)
    for outputs in engine.steps():
        for output in outputs:
            if output.request_id == name and len(output.outputs[0].token_ids) == 3:
                os.kill(engine.worker().stats()["actor_pids"][0], signal.SIGKILL)
            found["restarted"] = list(output.outputs[0].token_ids) == indexed.tokens
    engine.drain()
    deadline = time.monotonic() + 10
    while engine.worker().stats()["restarts"] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    found["disturbed"] = disturbed(engine, asked[:1], greedy)
    found["restarts"] = engine.worker().stats()["restarts"]
    found["fidelity"] = engine.worker().stats()["fidelity"]
    found["left"] = {key: engine.worker().stats()[key] for key in ("host_bytes", "index_bytes", "segments_waiting")}
    engine.close()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
