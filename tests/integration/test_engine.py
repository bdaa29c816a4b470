# SPDX-License-Identifier: Apache-2.0
"""One in-process CPU engine with a tiny pool and arena; freed memory is poisoned throughout."""

import contextlib
import os
import random
import signal
import time
from dataclasses import replace

import psutil
import pytest
from vllm.exceptions import VLLMValidationError

from vllm_retrieval_attn.bench.engine import InProcessEngine
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.workers import pool as pool_module

KNOBS = {
    "sink_tokens": 16,
    "window_tokens": 64,
    "index": "flat",
    "page_tokens": 256,
    "resident_tokens": 0,
    "host_memory_gb": 0.15,
    "threads": 2,
    "poison_freed": True,
    "answer_timeout_s": 0.5,
    "worker_timeout_s": 3,
}
CHUNK, BLOCK, MAX_LEN = 256, 16, 1_000_000
NEW = 16
GREEDY = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    engine = InProcessEngine(
        str(smollm2()),
        KNOBS,
        dtype="float32",
        hf_overrides={"max_position_embeddings": MAX_LEN},
        max_model_len=MAX_LEN,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        block_size=BLOCK,
        kv_cache_memory_bytes=180 * BLOCK * 46_080,
        enforce_eager=True,
        seed=0,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(engine):
    from vllm_retrieval_attn.evaluation.needles import filler

    ids = engine.llm.get_tokenizer().encode(filler()[:60_000])
    rng = random.Random(3)
    lengths = [40, 100, 350, 700, 1500]
    return [ids[start : start + n] for n in lengths for start in [rng.randrange(5000)]]


@pytest.fixture(scope="module")
def truth(prompts):
    """Greedy tokens of full attention, from transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(smollm2()), dtype=torch.float32)
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=2,
            )
            answers.append(out[0, len(prompt) :].tolist())
    return answers


def assert_nothing_left(engine):
    engine.drain()
    assert engine.held_blocks() == {}
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1  # one is the null block
    stats = engine.worker().stats()
    assert (stats["host_bytes"], stats["host_tokens"], stats["requests"]) == (0, 0, 0)


def test_a_million_tokens_of_max_model_len_start_in_a_small_pool(engine):
    assert engine.engine.vllm_config.model_config.max_model_len == MAX_LEN
    assert engine.pool.num_gpu_blocks * BLOCK < 4000


def test_greedy_tokens_equal_full_attention_one_by_one(engine, prompts, truth):
    for prompt, want in zip(prompts, truth, strict=True):
        assert engine.run([prompt], **GREEDY)[0].tokens == want
    assert_nothing_left(engine)


def test_a_request_holds_no_more_blocks_than_the_bound(engine, prompts):
    engine.max_blocks.clear()
    engine.run([prompts[-1]], **GREEDY)
    bound = Split(KNOBS["sink_tokens"], KNOBS["window_tokens"], KNOBS["resident_tokens"], BLOCK).blocks_bound(CHUNK)
    assert max(engine.max_blocks.values()) <= bound < len(prompts[-1]) // BLOCK


def test_all_at_once_with_preemption_equal_full_attention(engine, prompts, truth):
    answers = engine.run(prompts, **GREEDY)
    assert [answer.tokens for answer in answers] == truth
    assert_nothing_left(engine)


def test_preempted_and_resumed_requests_answer_right(engine, prompts, truth):
    names = [engine.add(prompt, **GREEDY) for prompt in prompts[-3:]]
    tokens, preempted = {}, 0
    for outputs in engine.steps():
        tokens |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
        scheduler = engine.scheduler
        running = [r for r in scheduler.running if r.num_output_tokens > 5 and r.num_preemptions == 0]
        if running:
            import time

            request = running[-1]
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())
            preempted += 1
    assert preempted >= 3
    assert list(tokens.values()) != []
    by_external = {name: next(t for key, t in tokens.items() if key.startswith(name)) for name in names}
    assert list(by_external.values()) == truth[-3:]
    assert_nothing_left(engine)


def test_n_greater_than_one_gives_n_answers(engine, prompts):
    from vllm import SamplingParams

    params = SamplingParams(n=3, temperature=0.8, max_tokens=8, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompts[3]}], params, use_tqdm=False)
    assert len(output.outputs) == 3
    assert all(len(answer.token_ids) == 8 for answer in output.outputs)
    assert_nothing_left(engine)


def test_random_aborts_leave_nothing_and_do_not_disturb_others(engine, prompts, truth):
    rng = random.Random(7)
    for _ in range(2):
        names = [engine.add(prompt, **GREEDY) for prompt in prompts]
        doomed = set(rng.sample(names, 2))
        finished = {}
        for outputs in engine.steps():
            for output in outputs:
                finished[output.request_id] = list(output.outputs[0].token_ids)
            for name in [name for name in doomed if rng.random() < 0.3]:
                engine.engine.abort_request([name])
                doomed.discard(name)
        for name, want in zip(names, truth, strict=True):
            if len(finished.get(name, [])) == NEW:
                assert finished[name] == want
        assert_nothing_left(engine)


def test_requests_wait_while_the_arena_is_full(engine, prompts, truth):
    ledger = engine.scheduler.connector._ledger
    spare = ledger.free_pages - 7
    ledger.hold("somebody else", ledger.split.sink_end + spare * ledger.page_tokens)
    try:
        # 6 pages of 256 tokens each, none of them shared.
        names = [engine.add(prompts[-1], **GREEDY, skip_reading_prefix_cache=True) for _ in range(2)]
        most, answers = 0, {}
        for outputs in engine.steps():
            most = max(most, len(engine.scheduler.running))
            answers |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
    finally:
        ledger.forget("somebody else")
    assert most == 1
    assert [answers[name] for name in names] == [truth[-1]] * 2
    assert_nothing_left(engine)


def test_a_prompt_that_can_never_fit_is_refused_with_one_line(engine):
    with pytest.raises(VLLMValidationError, match="raise host_memory_gb") as refused:
        engine.add([5] * 20_000, **GREEDY)
    assert "\n" not in str(refused.value)
    assert_nothing_left(engine)


def children_of(pid):
    """Names and process ids of a process's descendants."""
    return {child.name(): child.pid for child in psutil.Process(pid).children(recursive=True)}


def await_workers(pool, other_than=()):
    deadline = time.monotonic() + 90
    while not pool.alive() or pool.pids() == other_than:  # one that is killed may live for a moment
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pool._recent.clear()  # else there would be too many within a minute


def test_what_runs_beside_the_engine_is_small_and_idle(engine):
    pool = engine.worker().pool
    await_workers(pool)
    time.sleep(2)
    supervisor = psutil.Process(pool.supervisor_pid)
    beside = [supervisor, *supervisor.children(recursive=True)]
    time.sleep(1)
    beside = [process for process in beside if process.is_running()]  # Ray forks some in passing
    assert len(beside) <= 6, [process.name() for process in beside]
    maps = [part for process in beside for part in process.memory_maps()]
    assert sum(part.pss for part in maps if "vllm-retrieval-" not in part.path) < 520e6  # without the arena
    ours = [supervisor, *map(psutil.Process, pool.pids())]
    before = [sum(process.cpu_times()[:2]) for process in ours]
    time.sleep(5)
    used = [sum(process.cpu_times()[:2]) - start for process, start in zip(ours, before, strict=True)]
    print("idle CPU, supervisor and workers", used)
    assert sum(used) < 0.02 * 5


def worker_of(pool):
    """Process id of a worker that is attached; 0 would be the tests' own process group."""
    pid = pool.pids()[0]
    if pid == 0:
        raise ProcessLookupError
    return pid


FAULTS = {
    "worker killed": lambda pool: os.kill(worker_of(pool), signal.SIGKILL),
    "worker stopped": lambda pool: os.kill(worker_of(pool), signal.SIGSTOP),
    "supervisor killed": lambda pool: os.kill(pool.supervisor_pid, signal.SIGKILL),
    "raylet killed": lambda pool: os.kill(children_of(pool.supervisor_pid)["raylet"], signal.SIGKILL),
    "Ray's head killed": lambda pool: os.kill(children_of(pool.supervisor_pid)["gcs_server"], signal.SIGKILL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_dies_beside_the_engine_the_answer_is_the_same(engine, prompts, truth, fault):
    pool, before = engine.worker().pool, engine.worker().stats()
    pids = pool.pids()
    engine.add(prompts[-1], **GREEDY)
    last, done, longest, begin = [], False, 0.0, time.monotonic()
    for outputs in engine.steps():
        now = time.monotonic()
        if done:
            longest = max(longest, now - begin)
        if not done and outputs and len(outputs[0].outputs[0].token_ids) > 4:
            FAULTS[fault](pool)
            done, now = True, time.monotonic()
        begin = now
        last = outputs or last
    assert list(last[0].outputs[0].token_ids) == truth[-1]
    assert longest < KNOBS["answer_timeout_s"] + 1  # Ray starts anew meanwhile, on the same two cores
    told = last[0].kv_transfer_params["retrieval"]["degraded_steps"]
    assert told == engine.worker().stats()["degraded_steps"] - before["degraded_steps"]
    if "worker" in fault:
        assert told > 0
    deadline = time.monotonic() + 60
    while engine.worker().stats()["restarts"] == before["restarts"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    await_workers(pool, other_than=pids)
    assert engine.run([prompts[-1]], **GREEDY)[0].tokens == truth[-1]
    assert engine.worker().stats()["degraded_steps"] == before["degraded_steps"] + told
    assert_nothing_left(engine)


def test_faults_at_random_cost_no_answer(engine, prompts, truth):
    pool, rng = engine.worker().pool, random.Random(1)
    stopped = []

    def go_on(pool):
        while stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped.pop(), signal.SIGCONT)

    def stop(pool):
        everybody = [pool.supervisor_pid, *pool.pids(), *children_of(pool.supervisor_pid).values()]
        stopped.append(rng.choice([pid for pid in everybody if pid]))
        os.kill(stopped[-1], signal.SIGSTOP)

    kinds = [stop, go_on, go_on, *FAULTS.values()]
    for _ in range(4):
        engine.add(prompts[-1], **GREEDY)
        last, at = [], rng.sample(range(NEW), 3)
        for outputs in engine.steps():
            last = outputs or last
            if outputs and len(outputs[0].outputs[0].token_ids) in at:
                with contextlib.suppress(ProcessLookupError, KeyError, psutil.NoSuchProcess):  # it is dead already
                    rng.choice(kinds)(pool)
                pool._recent.clear()
        assert list(last[0].outputs[0].token_ids) == truth[-1]
        go_on(pool)
    await_workers(pool)
    assert engine.run([prompts[-1]], **GREEDY)[0].tokens == truth[-1]
    assert_nothing_left(engine)


def test_workers_that_never_come_back_cost_no_answer_and_the_log_says_so(engine, prompts, truth, caplog, monkeypatch):
    """The last one of this engine: there are no workers afterwards."""
    pool = engine.worker().pool
    monkeypatch.setattr(pool_module, "RESTARTS_WITHIN_S", 600.0)  # a start may take ten seconds on a busy machine
    pool.plan = replace(pool.plan, setup=replace(pool.plan.setup, path="/nonexistent"))
    os.kill(pool.supervisor_pid, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while not pool.gave_up:
        assert engine.run([prompts[-1], prompts[0]], **GREEDY)[0].tokens == truth[-1]
        assert time.monotonic() < deadline
    assert "there will be no more" in caplog.text
    assert "/nonexistent" in caplog.text
    restarts = pool.restarts
    answers = engine.run([prompts[-1], prompts[0]], **GREEDY)
    assert [answer.tokens for answer in answers] == [truth[-1], truth[0]]
    assert answers[0].retrieval["degraded_steps"] == NEW - 1  # the first token is the prefill's
    assert pool.restarts == restarts
    assert pool._supervisor.poll() is not None
    assert_nothing_left(engine)
