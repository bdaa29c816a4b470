# SPDX-License-Identifier: Apache-2.0
"""Long requests among 200 short ones, on vLLM's backend and on ours, undisturbed and beside workers that are slow,
stopped or killed: run by test_crowd.py in a process of its own."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.families import KNOBS, make_model, make_starts_fast
from vllm_retrieval_attn.bench.engine import InProcessEngine

SHORT, LONG, NEW = 200, (1, 16), 8
TIMEOUT_S = 5.0
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("CPU_ATTN", None),
    "flat": ("retrieval", {**KNOBS, "index": "flat", "answer_timeout_s": TIMEOUT_S}),
    "attention": ("retrieval", {**KNOBS, "rows": 512, "fidelity": 0.0, "answer_timeout_s": TIMEOUT_S}),
}


def prompts(long: int) -> list[list[int]]:
    """The long ones first."""
    rng = random.Random(long)
    lengths = [rng.randrange(1600, 1900) for _ in range(long)] + [rng.randrange(1, 60) for _ in range(SHORT)]
    return [[rng.randrange(3, 500) for _ in range(length)] for length in lengths]


def tell(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid:  # 0 would be all of us
            os.kill(pid, number)


@contextlib.contextmanager
def halting(pool: Any, how: str) -> Iterator[None]:
    """The CPU worker runs for a fifth of the time meanwhile, or stands still now and then, for less than anybody
    waits."""
    over, rng = threading.Event(), random.Random(5)

    def halt() -> None:
        while not over.wait({"slow": 0.005, "delayed": 0.2}[how]):
            pid = pool.pids()[0]
            tell(pid, signal.SIGSTOP)
            time.sleep({"slow": 0.02, "delayed": rng.uniform(0.05, 0.3)}[how])
            tell(pid, signal.SIGCONT)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def losing(engine: InProcessEngine, how: str) -> Iterator[None]:
    """The CPU worker is killed, or stopped for longer than anybody waits, when answers have three tokens."""
    plain, pool = engine.steps, engine.worker().pool
    later: list[threading.Timer] = []

    def lose() -> None:
        pid = pool.pids()[0]
        tell(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        later.append(threading.Timer(2 * TIMEOUT_S, tell, (pid, signal.SIGCONT)))
        later[0].start()

    def steps() -> Iterator[list[Any]]:
        for outputs in plain():
            if not later and any(len(output.outputs[0].token_ids) >= 3 for output in outputs):
                lose()
            yield outputs

    engine.steps = steps
    try:
        yield
    finally:
        engine.steps = plain
        for timer in later:
            timer.join()


def answers(model: Path, way: str) -> dict[str, Any]:
    backend, knobs = WAYS[way]
    engine = InProcessEngine(
        str(model), knobs, backend, dtype="float32", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=256,
        max_num_batched_tokens=1024, kv_cache_memory_bytes=2 * 10**8, enforce_eager=True,
    )  # fmt: skip

    def run(asked: list[list[int]], new: int = NEW) -> dict[str, Any]:
        told = engine.run(asked, temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=5)
        return {
            "tokens": [one.tokens for one in told],
            "logprobs": [one.logprobs for one in told],
            "degraded": sum(one.retrieval["degraded_steps"] for one in told if one.retrieval),
        }

    found: dict[str, Any] = {f"{long} long": run(prompts(long)) for long in LONG}
    asked = prompts(LONG[1])[: LONG[1]]
    if way == "attention":
        found["alone"] = {"tokens": [], "logprobs": []}
        for prompt in asked[:4]:
            one = run([prompt])
            found["alone"]["tokens"] += one["tokens"]
            found["alone"]["logprobs"] += one["logprobs"]
    if way != "full":
        pool = engine.worker().pool
        found["calm"] = run(asked, 40)
        for how in ("slow", "delayed", "stopped", "killed"):
            with halting(pool, how) if how in ("slow", "delayed") else losing(engine, how):
                found[how] = run(asked, 40)
            deadline = time.monotonic() + 300
            while not (pool.alive() and engine.worker().client.idle()):
                assert time.monotonic() < deadline, f"workers are not back: {how}"
                time.sleep(0.05)
        found["restarts"] = dict(pool.restarts)
        found["afterwards"] = run(asked, 40)
    engine.close()
    return found


def main(out: Path) -> None:
    make_starts_fast()
    model = make_model("llama 3.1", out.with_suffix(""))
    out.write_text(json.dumps({way: answers(model, way) for way in WAYS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
