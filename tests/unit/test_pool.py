# SPDX-License-Identifier: Apache-2.0
"""The hold on the CPU workers: what is counted, and when there is an end to it. The supervisor is a stand-in."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.unit.layouts import make_layout
from vllm_retrieval_attn.store.layout import ACTOR_DONE
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers import pool as module
from vllm_retrieval_attn.workers.pool import MOST_RESTARTS, WorkerPool
from vllm_retrieval_attn.workers.supervisor import ActorSetup, Plan

_STAND_IN = """
import json, select, subprocess, sys
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.supervisor import Plan
setup = Plan.of(sys.stdin.readline()).setup
if setup.scale < 0:
    print(json.dumps({"event": "ended", "error": "the scale is negative"}), flush=True)
    sys.exit(1)
views = Views(setup.layout, SharedFile.attach(setup.path).map)
def start(actor):
    worker = subprocess.Popen(["sleep", "100"])
    views.words[views.actor_word(actor)] = worker.pid
    return worker
workers = [start(actor) for actor in range(setup.layout.actors)]
print(json.dumps({"event": "beat"}), flush=True)
while not select.select([sys.stdin], [], [], 0.05)[0]:
    for actor, worker in enumerate(workers):
        if worker.poll() is not None:
            print(json.dumps({"event": "restarting", "actor": actor}), flush=True)
            workers[actor] = start(actor)
for worker in workers:
    worker.kill()
"""


class Config:
    worker_timeout_s, candidates, scan, spin_ns, cpus, ray_address = 0.5, 64, "auto", 1000, [0], None


@pytest.fixture
def made(monkeypatch):
    """Pools with the stand-in for a supervisor."""
    layout = make_layout(actors=2, kv_heads=2)
    file = SharedFile.create(layout.file_bytes, rank=92)
    views = Views(layout, file.map)
    pools = []
    stand_in = SimpleNamespace(  # in that module alone: engines of other tests start meanwhile
        Popen=lambda command, **how: subprocess.Popen([sys.executable, "-c", _STAND_IN], **how),
        PIPE=subprocess.PIPE,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(module, "subprocess", stand_in)

    def make(scale=1.0):
        pools.append(WorkerPool(Config, layout, views, file.path, scale))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    file.close()


def await_that(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_plan_survives_its_way():
    plan = Plan(ActorSetup("/dev/shm/x", make_layout(actors=2), 0.25, 4096, False, 50_000, [0, 3]), "auto")
    assert Plan.of(plan.line()) == plan
    assert "\n" not in plan.line()


def test_workers_that_do_not_start_are_told_with_their_reason(made):
    with pytest.raises(RuntimeError, match=r"not all of 2 CPU workers started.*the scale is negative"):
        made(scale=-1.0)


def test_a_supervisor_that_ends_at_start_is_tried_again(made, monkeypatch):
    first = json.dumps({"event": "ended", "error": "Ray did not start"})
    plain, scripts = module.subprocess.Popen, [f"print({first!r}, flush=True)", "raise SystemExit(3)"]

    def start(command, **how):
        return subprocess.Popen([sys.executable, "-c", scripts.pop(0)], **how) if scripts else plain(command, **how)

    monkeypatch.setattr(module.subprocess, "Popen", start)
    pool = made()
    assert pool.alive()
    assert pool._failures == ["Ray did not start", "their supervisor ended with 3"]
    assert not pool.restarts


def test_a_dead_supervisor_is_replaced_and_its_workers_with_it(made):
    pool = made()
    before, supervisor = pool.pids(), pool.supervisor_pid
    assert pool.alive()
    pool._supervisor.kill()
    await_that(lambda: pool.supervisor_pid != supervisor and pool.alive())
    assert not set(before) & set(pool.pids())
    assert not any(pool.lives(pid) for pid in before)
    assert pool.restarts == {"supervisor": 1}


def test_a_silent_supervisor_is_replaced(made, monkeypatch):
    monkeypatch.setattr(module, "_SUPERVISOR_SILENT_S", 1.0)
    pool = made()
    supervisor = pool.supervisor_pid
    await_that(lambda: pool.supervisor_pid != supervisor)
    assert pool.restarts["supervisor"] >= 1


def test_a_silent_worker_is_ended(made):
    pool = made()
    pid = pool.pids()[1]
    pool._views.words[0] = 7  # a message that nobody answers
    await_that(lambda: not pool.lives(pid))
    pool._views.words[0] = 0
    await_that(lambda: pool.alive() and pool.restarts)  # which another thread counts
    assert set(pool.restarts) == {"silent"}
    assert pool._supervisor.poll() is None


def test_a_worker_that_is_behind_and_at_work_is_not_silent(made):
    pool = made()
    words, pid = pool._views.words, pool.pids()[1]
    begun = time.monotonic()
    while time.monotonic() - begun < 3 * pool._silent_s:
        words[0] += 1
        for actor in range(2):
            words[pool._views.actor_word(actor, ACTOR_DONE)] = words[0] - 1
        time.sleep(0.02)
    assert pool.lives(pid)
    assert not pool.restarts
    assert pool.silent()


def test_a_worker_is_restarted_when_somebody_asks(made):
    pool = made()
    before = pool.pids()
    assert pool.restart(1)
    await_that(lambda: pool.pids()[1] != before[1] and pool.alive() and pool.restarts)
    assert pool.pids()[0] == before[0]
    assert pool.restarts == {"asked": 1}
    assert not pool.gave_up


def test_after_too_many_restarts_there_are_no_more(made, caplog):
    pool = made()
    pool.plan = replace(pool.plan, setup=replace(pool.plan.setup, scale=-1.0))
    pool._supervisor.kill()
    await_that(lambda: pool.gave_up)
    assert pool.restarts.total() == MOST_RESTARTS + 1
    await_that(lambda: "there will be no more" in caplog.text)
    assert "the scale is negative" in caplog.text
    time.sleep(0.5)
    assert pool.restarts.total() == MOST_RESTARTS + 1
    assert pool._supervisor.poll() is not None
    assert not pool.alive()


def test_closing_ends_everything(made):
    pool = made()
    pids = pool.pids()
    pool.close()
    assert pool._supervisor.poll() is not None
    assert not any(pool.lives(pid) for pid in pids)
