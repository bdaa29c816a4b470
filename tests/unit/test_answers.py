# SPDX-License-Identifier: Apache-2.0
"""A worker's steps in which a graph asks the CPU workers: begun, sent, and looked back at by the next one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from tests.asking_machine import AskingMachine
from tests.emulator.build import AVAILABLE, EmulatedAskKernels
from vllm_retrieval_attn.device.plan import StepPlan
from vllm_retrieval_attn.plugin.answers import Answers
from vllm_retrieval_attn.plugin.messages import StepMessage
from vllm_retrieval_attn.plugin.worker import RetrievalWorker
from vllm_retrieval_attn.store.layout import ROW_INDEXED, ROW_TABLE, SLOT_GENERATION

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++")


class Told:
    """In place of WorkerStats."""

    def __init__(self):
        self.steps, self.counts, self.parts = [], {}, []

    def step(self, plan):
        if plan is not None:
            self.steps.append("degraded" if plan.attends_here else "answered")

    def count(self, name, value):
        self.counts[name] = self.counts.get(name, 0) + value

    def layer(self, parts):
        self.parts.append(parts["search"])


class Served:
    """A worker half whose graph is replayed by emulated kernels; ``late``: nobody answers."""

    def __init__(self, machine):
        self.machine, self.alive, self.steps = machine, True, 0
        nothing = SimpleNamespace(keep=lambda kept: None, step_ends=lambda: None)
        made = self.worker = object.__new__(RetrievalWorker)
        made.hosted, made.sketch, made.sampler, made.space, made.cuda = True, None, None, None, None
        made.config, made.arena = (
            SimpleNamespace(poison_freed=False, split=None),
            SimpleNamespace(views=machine.ring.views, layout=machine.layout, requests={}),
        )
        made.client, made.pool = machine.client, SimpleNamespace(alive=lambda: self.alive, gave_up=False)
        made.asking, made._told, made._prefixes = machine.asking, Told(), nothing
        made.answers = Answers(made.arena, machine.client, machine.asking, lambda: None)
        made._plan, made._message, made._read, made._options, made._growth = None, None, {}, {}, []
        made._written, made._names, made.graph_steps, made.paged_steps, made.paged = None, ["a"], 0, 0, False
        made.plan = self._plan

    def _plan(self, metadata, graph):
        assert graph
        plan = self.next
        self.worker._plan = plan
        if plan.searched and not (self.worker.pool.alive() and self.worker.client.idle()):
            self.worker.answers.attend_here(plan, "gone")
        return plan

    def step(self, message, ids):
        """One step as the runner takes it; returns its layers, and what it reports."""
        machine, worker = self.machine, self.worker
        of = machine.plan(message)
        self.next = StepPlan(
            mirror_tokens=of.mirror_tokens, mirror_pages=of.mirror_pages, mirror_offsets=of.mirror_offsets,
            decode_tokens=of.decode_tokens, decode_rows=message, decode_ids=ids,
            rows_read=np.zeros(len(ids), np.int64),
        )  # fmt: skip
        worker.begin_step(StepMessage())
        worker.begin_graph({"a": None})
        layers = [machine.inputs(len(ids)) for _ in range(machine.layout.layers)]
        self.paged = [(out.clone(), lse.clone()) for _, out, lse in layers]
        for layer, (inputs, out, lse) in enumerate(layers):
            machine.kernels.layer(layer, inputs, out, lse)
        worker.finish_forward()
        report = worker.report()
        worker.end_step()
        return layers, report


@pytest.fixture
def served():
    made = []

    def make(**sizes):
        made.append(AskingMachine(EmulatedAskKernels, "cpu", **sizes))
        return Served(made[-1])

    yield make
    for machine in made:
        machine.close()


def test_a_step_is_counted_by_the_next_one(served):
    one = served()
    one.machine.ring.start_all()
    worker, told, lay = one.worker, one.worker._told, one.machine.layout
    message, stored = one.machine.fill([200, 31], 1)
    for number in range(3):
        layers, report = one.step(message, ["x", "y"])
        one.machine.check(layers, one.paged, stored, [0, 1])
        assert told.steps == ["answered"] * number
        assert worker.graph_steps == number + 1
        searches = lay.layers * lay.kv_heads
        wanted = {"x": (200 * searches, searches), "y": (31 * searches, searches)}
        assert (report.read if report else {}) == (wanted if number else {})
    worker.begin_step(StepMessage())
    assert told.counts["rows_read"] == 3 * 231 * lay.layers * lay.kv_heads
    assert told.counts["searches"] == 3 * 2 * lay.layers * lay.kv_heads
    assert len(told.parts) == 3
    assert min(told.parts) > 0
    assert worker.answers.degraded_steps == 0


def test_late_workers_cost_one_wait_and_are_asked_again_once_they_are_done(served):
    one = served(limit_s=0.3)
    worker, told = one.worker, one.worker._told
    message, stored = one.machine.fill([150], 2)
    _, report = one.step(message, ["x"])
    assert report is None
    for number in range(2):  # the first wait ended, and the message is still there
        layers, report = one.step(message, ["x"])
        one.machine.check(layers, one.paged, stored, [0])
        assert report.degraded == {"x"}
        assert told.steps == ["degraded"] * (number + 1)
    one.machine.ring.start_all()
    one.machine.ring.await_idle()
    one.step(message, ["x"])
    layers, report = one.step(message, ["x"])
    assert told.steps == ["degraded"] * 3 + ["answered"]
    assert report.degraded == set()
    assert worker.answers.degraded_steps == 3


def test_dead_workers_are_not_asked(served):
    one = served(limit_s=600.0)
    one.alive = False
    message, stored = one.machine.fill([150, 70], 3)
    layers, report = one.step(message, ["x", "y"])
    one.machine.check(layers, one.paged, stored, [0, 1])
    assert report.degraded == {"x", "y"}
    one.worker.begin_step(StepMessage())
    lay = one.machine.layout
    assert one.worker._told.counts["rows_read"] == 220 * lay.layers * lay.kv_heads
    assert one.worker._told.steps == ["degraded"]
    assert one.worker.report().degraded == set()
    assert one.worker.report() is None


def test_a_request_whose_search_failed_is_told_of(served):
    one = served(indexed=True, table_pages=20)
    one.machine.ring.start_all()
    message, stored = one.machine.fill([1100, 80], 4)
    message[0, ROW_INDEXED] = 1088
    one.machine.ring.views.slots[message[0, ROW_TABLE], SLOT_GENERATION] += 1
    layers, _ = one.step(message, ["x", "y"])
    one.machine.check(layers, one.paged, stored, [0, 1])
    one.worker.begin_step(StepMessage())
    report = one.worker.report()
    assert (report.failed, report.degraded) == (set(), {"x"})
    assert one.worker._told.steps == ["answered"]


def test_eager_steps_go_on_in_between(served):
    one = served()
    one.machine.ring.start_all()
    message, _ = one.machine.fill([90], 5)
    one.step(message, ["x"])
    one.worker.begin_step(StepMessage())
    plan = StepPlan(decode_rows=message, decode_ids=["x"], rows_read=np.zeros(1, np.int64))
    lay = one.machine.layout
    found, found_lse = np.zeros((1, lay.heads, lay.dim), np.float32), np.zeros((1, lay.heads), np.float32)
    for layer in range(lay.layers):
        one.worker.answers.post(layer, plan)
        assert one.worker.answers.collect(plan, found, found_lse)
    one.worker._plan = plan
    one.worker.end_step()
    assert one.worker._told.steps == ["answered", "answered"]
    layers, report = one.step(message, ["x"])
    searches = 2 * lay.layers * lay.kv_heads
    assert report.read == {"x": (90 * lay.layers * lay.kv_heads, searches // 2)}
    assert torch.isfinite(layers[0][1].float()).all()
