"""One engine with the default index over short segments: run by test_index.py in a process of its own."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.bench.needles import questions
from vllm_retrieval_attn.demo import DOCUMENTS


def main(out: Path) -> None:
    engine = InProcessEngine(
        str(smollm2()),
        {"segment_tokens": 512, "host_memory_gb": 1, "poison_freed": True, "fidelity": 1.0},
        settle=True,
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
    found = {"right": [], "restarted": None}
    for question in asked:
        found["right"].append(question.number in engine.run([question.prompt], **greedy)[0].text)
    found["indexed"] = engine.worker().stats()["segments_indexed"]
    # A budget of 1 is exact attention, whatever the index holds.
    prompt = asked[0].prompt
    indexed = engine.run([prompt], **greedy)[0]
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
    found["fidelity"] = engine.worker().stats()["fidelity"]
    found["left"] = {key: engine.worker().stats()[key] for key in ("host_bytes", "index_bytes", "segments_waiting")}
    engine.close()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
