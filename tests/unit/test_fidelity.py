# SPDX-License-Identifier: Apache-2.0
"""Decode steps compared with exact attention off the serving path."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.layouts import make_layout
from tests.unit.rings import Ring
from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.device.fidelity import FIGURES, DecodeSampler
from vllm_retrieval_attn.device.sketch_plan import SketchPlan
from vllm_retrieval_attn.device.sketch_probe import HostPart
from vllm_retrieval_attn.store.layout import ROW_INDEXED, ROW_LIMIT, ROW_TABLE
from vllm_retrieval_attn.store.requests import RequestStore
from vllm_retrieval_attn.workers.indexes import Indexes
from vllm_retrieval_attn.workers.prober import Prober

LAYERS, TOKENS, INDEXED = 2, 3000, 2816


class Probed:
    """A ring with one indexed row, the same in both layers, and its probers."""

    def __init__(self, actors=1, rows=300, indexed=INDEXED, elsewhere=False):
        shape = make_layout(
            "bfloat16", kv_heads=2, group=2, dim=64, actors=actors, page_tokens=256, table_pages=12, max_rows=2,
            layers=LAYERS, indexed=True,
        )  # fmt: skip
        self.ring = ring = Ring(shape, "bfloat16", elsewhere=elsewhere)
        self.message, self.stored = ring.fill(0, [TOKENS], 11, [indexed], rows)
        ring.pages[:, 1] = ring.pages[:, 0]
        ring.start_all()
        self.sampler = DecodeSampler(shape, ring.views, 1.0)
        views = ring.lane_views
        self.probers = [
            Prober(ring.layout, views, Indexes(ring.layout, views, actor), actor, ring.scale) for actor in range(actors)
        ]
        torch.manual_seed(1)
        self.paged, self.paged_lse = torch.randn(1, 4, 64), torch.randn(1, 4) + 5

    def step(self, spoil=0.0):
        plan = SimpleNamespace(decode_rows=self.message, probe=-1, sketch=None)
        self.sampler.begin(plan)
        for layer in range(LAYERS):
            found, lse = self.ring.ask(layer, self.message, plan.probe)
            if self.sampler.active:
                self.sampler.record(
                    layer, self.ring.queries, found.numpy(), lse.numpy() + spoil, self.paged.numpy(),
                    self.paged_lse.numpy(),
                )  # fmt: skip
        self.sampler.end()
        return plan.probe

    def compared(self):
        for prober in self.probers:
            prober.start()
        deadline = time.monotonic() + 60
        while self.ring.views.probing():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.sampler.figures()

    def close(self):
        for prober in self.probers:
            prober.stop()
        self.sampler._views = None
        for prober in self.probers:
            prober._views = prober._indexes = None
        self.ring.close()


@pytest.fixture
def probed():
    made = []

    def make(**kwargs):
        made.append(Probed(**kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("actors", "elsewhere"), [(1, False), (2, False), (1, True)])
def test_figures_are_those_of_the_rows_read(probed, actors, elsewhere):
    one = probed(actors=actors, elsewhere=elsewhere)
    assert one.step() == 0
    figures = one.compared()
    assert list(figures) == ["layers 0-0", "layers 1-1"]
    lay, ring = one.ring.layout, one.ring
    read = np.zeros((2, TOKENS), bool)
    for head in range(2):
        count, *ids = ring.views.chosen[0, head]
        read[head, ids[:count]] = True
    read[:, INDEXED:] = True
    recall, mass = [], []
    for head in range(4):
        scores = one.stored[0][head // lay.group, :, 0] @ ring.queries[0, head].double() * ring.scale
        mine = torch.from_numpy(read[head // lay.group])
        recall.append(mine[scores.topk(100).indices].double().mean())
        mass.append((torch.softmax(scores, 0) * mine).sum())
    told = figures["layers 0-0"]
    assert told["recall"] == pytest.approx(float(np.mean(recall)), abs=1e-3)
    assert told["mass"] == pytest.approx(float(np.mean(mass)), abs=2e-3)
    assert 0 < told["output_error"] < 0.5
    assert abs(told["lse_bias"]) < 0.2


def test_a_wrong_log_sum_exp_shows_with_its_sign(probed):
    one = probed()
    one.step(spoil=-0.5)
    biased = one.compared()["layers 0-0"]["lse_bias"]
    assert -0.7 < biased < -0.2


def test_a_row_that_reads_everything_has_no_error(probed):
    one = probed()
    one.message[:, ROW_LIMIT] = 1000
    one.message[:, ROW_INDEXED] = 1024
    one.step()
    told = one.compared()["layers 1-1"]
    assert told["recall"] > 0.99
    assert told["output_error"] < 0.02


def test_a_probe_whose_request_ends_is_dropped(probed):
    one = probed()
    one.step()
    one.sampler.forget(int(one.message[0, ROW_TABLE]))
    assert one.compared() == {}
    assert one.sampler.probes == 0


def test_one_probe_at_a_time_and_exact_rows_are_none(probed):
    one = probed()
    assert one.step() == 0
    assert one.step() == -1
    one.compared()
    one.message[:, ROW_INDEXED] = 0
    assert one.step() == -1


def test_every_figure_is_told(probed):
    one = probed()
    one.step()
    assert set(one.compared()["layers 0-0"]) == set(FIGURES)


def test_a_row_that_the_sketch_answered_is_compared_alike(probed):
    """The same rows, read by the workers and then told as those of a sketch, give the same figures."""
    one = probed()
    assert one.step() == 0
    by_workers = one.compared()
    ring, sampler = one.ring, one.sampler
    chosen = ring.views.chosen.copy()
    plan = SketchPlan()
    plan.add_empty(0)
    store = RequestStore("r", 1, int(one.message[0, ROW_TABLE]), 1, pages=[0], codes=[0])
    plan.add(store, 1, TOKENS, -1, TOKENS + 700, SearchOptions(rows=300))
    step = SimpleNamespace(decode_rows=np.empty((0, 8), np.int64), probe=-1, sketch=plan)
    assert sampler.draw() is True
    sampler.begin(step)
    assert (plan.probe, sampler.active) == (1, False)
    for layer in range(LAYERS):
        found, lse = ring.ask(layer, one.message, 0)
        ids = [chosen[layer, head, 1 : 1 + chosen[layer, head, 0]] for head in range(2)]
        ids = [np.concatenate((part, np.arange(INDEXED, TOKENS, dtype=np.int32))) for part in ids]
        told = HostPart(found[0].numpy(), lse[0].numpy(), ids)
        query = ring.queries[0].float().numpy()
        sampler.record_sketched(layer, query, told, one.paged[0].numpy(), one.paged_lse[0].numpy())
    sampler.end()
    deadline = time.monotonic() + 60
    while ring.views.probing():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sampler.figures().keys() == by_workers.keys()
    assert sampler.probes == 2
    for layers, figures in sampler.figures().items():
        for name, value in figures.items():
            assert value == pytest.approx(by_workers[layers][name], abs=2e-4), name


def test_a_step_that_is_cancelled_is_not_compared(probed):
    one = probed()
    one.sampler.begin(SimpleNamespace(decode_rows=one.message, probe=-1, sketch=None))
    assert one.sampler.active
    one.sampler.cancel()
    assert not one.sampler.active
    one.sampler.end()
    assert not one.ring.views.probing()
    assert one.step() == 0
    assert one.compared()


def test_which_steps_are_drawn_does_not_depend_on_what_is_waited_for():
    """Tensor-parallel ranks wait for different times, and must not take a step in different ways."""
    ring = Ring(make_layout())
    try:
        ranks = [DecodeSampler(ring.layout, ring.views, 0.3) for _ in range(2)]
        plan = SimpleNamespace(decode_rows=np.zeros((0, 8), np.int64), sketch=None)
        drawn = []
        for step in range(200):
            ranks[1]._waiting = step % 3 > 0
            ranks[1]._poll = lambda: None
            drawn.append([rank.draw() for rank in ranks])
            for rank in ranks:
                rank.begin(plan)
        assert all(one == other for one, other in drawn)
        assert 30 < sum(one for one, _ in drawn) < 90
    finally:
        for rank in ranks:
            rank._views = None
        ring.close()
