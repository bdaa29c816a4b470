# SPDX-License-Identifier: Apache-2.0
"""CPU lanes beside a GPU that is played by a test: what they leave on the board is attention to the rows posted."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.device.board import COUNT, HANDED, HOMES, LAYER, MESSAGES, PLACE, POSTED
from vllm_retrieval_attn.device.decode_step import PAGE, Geometry, Handed
from vllm_retrieval_attn.device.lane_share import SHARES, LaneShare
from vllm_retrieval_attn.device.lanes import Lanes

PAGES = 6


class Gpu:
    """Posts and looks, as decode_lanes.cuh does."""

    def __init__(self, group, dim, dtype, cpus, seed=0):
        self.random = np.random.default_rng(seed)
        self.geometry = Geometry(1, 2, group, dim, dtype, 4, 8, PAGES, 1, dim**-0.5)
        torch.manual_seed(seed)
        self.arena = torch.randn(PAGES * 2, PAGE, 2, dim).to(getattr(torch, dtype))
        self.lanes = Lanes(self.geometry, self.arena.view(torch.uint8).numpy().reshape(-1), cpus)
        self.layer = 0

    def post(self, runs):
        """A layer of ``runs``: (place, rows or -1)."""
        board, places = self.lanes._board, self.lanes._places
        self.layer += 1
        self.posted = []
        board.words[HANDED] = len(runs)
        board.words[LAYER] = self.layer
        for at, (place, count) in enumerate(runs):
            message, dim = MESSAGES + at * places.message, places.dim
            homes = self.random.choice(PAGES * 2, 4, replace=False)
            queries = torch.randn(places.group, dim).to(self.arena.dtype)
            if place and self.posted:
                queries = self.posted[-1][1]
            tokens = np.sort(self.random.choice(4 * PAGE, max(count, 0), replace=False))
            log_pi = -self.random.random(max(count, 0)).astype(np.float32)
            words = board.words[message // 8 :]
            words[COUNT], words[PLACE], words[HOMES : HOMES + 4] = count, place, homes * PAGE * 2 * dim
            if count > 0:
                begin = (message + places.queries) // 2
                board.halves[begin : begin + places.group * dim] = queries.view(torch.uint16).numpy().reshape(-1)
            begin = (message + places.log_pi) // 4
            board.floats[begin : begin + len(log_pi)] = log_pi
            begin = (message + places.tokens) // 2
            board.halves[begin : begin + len(tokens)] = tokens
            self.posted.append((homes, queries, tokens, log_pi))
            words[0] = self.layer

    def open(self):
        """A step that hands something: lanes that sleep are woken by the first call, and handed nothing."""
        deadline = time.monotonic() + 60
        while (handed := self.lanes.open_step(3)) is None:
            assert time.monotonic() < deadline
        return handed

    def wait(self):
        deadline = time.monotonic() + 60
        while not self.lanes.idle():
            assert time.monotonic() < deadline

    def part(self, at):
        """(g, d) sums, (g,) tops and totals that a lane left in place of run ``at``."""
        places = self.lanes._places
        begin = (places.parts + at * places.part) // 4
        found = self.lanes._board.floats[begin : begin + places.group * (places.dim + 2)].reshape(places.group, -1)
        return found[:, : places.dim].astype(float), found[:, places.dim].astype(float), found[:, places.dim + 1]

    def expected(self, runs):
        """exp(score - top) weighted sums over the rows of these runs, for tops as given by the lane."""
        scores, values = [], []
        for at in runs:
            homes, queries, tokens, log_pi = self.posted[at]
            rows = self.arena[homes[tokens // PAGE], tokens % PAGE].double().numpy()
            scores.append(queries.double().numpy() @ rows[:, 0].T * self.geometry.scale - log_pi)
            values.append(rows[:, 1])
        return np.concatenate(scores, 1), np.concatenate(values)


def segments(runs, lanes):
    """Runs that share a partial, by the first one."""
    found = {}
    for lane in range(lanes):
        first, last = lane * len(runs) // lanes, (lane + 1) * len(runs) // lanes
        begun = None
        for at in range(first, last):
            place, count = runs[at]
            if place == 0 or count < 0:
                begun = None
            if count < 0:
                continue
            begun = at if begun is None else begun
            found.setdefault(begun, []).append(at)
    return found


RUNS = st.lists(st.tuples(st.booleans(), st.one_of(st.just(-1), st.integers(0, 40), st.just(POSTED))), max_size=14)


def placed(drawn):
    """Runs whose place counts on within a unit, which begins where ``fresh`` says."""
    runs, place = [], 0
    for fresh, count in drawn:
        place = 0 if fresh or not runs else place + 1
        runs.append((place, count))
    return runs


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(3, 64, "float16"), (4, 128, "bfloat16"), (1, 80, "bfloat16")]),
    lanes=st.integers(1, 4), layers=st.lists(RUNS, min_size=1, max_size=3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_what_lanes_leave_is_attention_to_the_rows_posted(shape, lanes, layers, seed):
    gpu = Gpu(*shape, [0] * lanes, seed)
    try:
        for drawn in layers:
            runs = placed(drawn)
            assert gpu.open().share > 0
            gpu.post(runs)
            gpu.wait()
            for first, mine in segments(runs, lanes).items():
                sums, tops, totals = gpu.part(first)
                scores, values = gpu.expected(mine)
                if scores.shape[1] == 0:
                    assert not totals.any()
                    continue
                weights = np.exp(scores - tops[:, None])
                np.testing.assert_allclose(totals, weights.sum(1), rtol=2e-3)
                np.testing.assert_allclose(sums, weights @ values, atol=2e-3 * weights.sum(1).max())
    finally:
        gpu.lanes.close()
    assert not any(thread.is_alive() for thread in gpu.lanes._threads)


def test_a_row_that_is_not_in_the_arena_is_left_out():
    gpu = Gpu(3, 64, "float16", [0])
    try:
        board, places = gpu.lanes._board, gpu.lanes._places
        gpu.open()
        gpu.post([(0, 5)])
        gpu.wait()
        board.words[MESSAGES // 8 + HOMES : MESSAGES // 8 + HOMES + 4] = [-2, 2**62, places.home_limit + 1, -1]
        board.words[LAYER] = board.words[MESSAGES // 8] = 2
        gpu.wait()
        assert not gpu.part(0)[2].any()
    finally:
        gpu.lanes.close()


def test_idle_lanes_use_little_and_wake():
    gpu = Gpu(3, 64, "float16", [0, 0])
    try:
        gpu.open()
        gpu.post([(0, 5), (1, 7)])
        gpu.wait()
        time.sleep(0.1)
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in gpu.lanes._threads]
        before = sum(map(time.clock_gettime, clocks))
        time.sleep(1.0)
        assert sum(map(time.clock_gettime, clocks)) - before < 0.05
        assert gpu.lanes.open_step(1).share == 0  # wakes none
        assert gpu.lanes.open_step(3) is None
        gpu.open()
        gpu.post([(0, 5), (1, 7)])
        gpu.wait()
    finally:
        gpu.lanes.close()


def test_lanes_that_were_late_are_handed_nothing_until_they_are_idle_for_a_while(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("vllm_retrieval_attn.device.lanes.time", type("Clock", (), {"monotonic": lambda: now[0]}))
    gpu = Gpu(3, 64, "float16", [0])
    try:
        first = gpu.open()
        gpu.lanes.note(3, first, True, 1, 0.0)
        assert "did not answer" in caplog.text
        assert gpu.lanes.open_step(3) is None
        now[0] += 2
        monkeypatch.setattr(gpu.lanes, "idle", lambda: False)
        assert gpu.lanes.open_step(3) is None
        monkeypatch.setattr(gpu.lanes, "idle", lambda: True)
        again = gpu.open()
        assert (again.share, again.generation) == (first.share, first.generation + 1)
        gpu.lanes.note(3, first, True, 1, 0.0)
        now[0] += 1.5  # twice as long by now
        for _ in range(100):
            assert gpu.lanes.open_step(3) is None
            time.sleep(1e-4)
    finally:
        gpu.lanes.close()
    assert gpu.lanes.late_steps == 2


@pytest.mark.parametrize(("share", "worked", "learned"), [(96, True, 1), (96, False, 0), (0, False, 1), (0, True, 0)])
def test_a_share_is_learned_from_steps_that_had_it(share, worked, learned, monkeypatch):
    gpu, told = Gpu(3, 64, "float16", [0]), []
    monkeypatch.setattr(gpu.lanes._share, "learn", lambda *what: told.append(what))
    gpu.lanes.note(3, Handed(share, 1), worked, 0, 5e-5)
    gpu.lanes.close()
    assert told == [(3, share, 5e-5 * 1e6)] * learned


def test_a_lane_that_fails_is_handed_nothing(monkeypatch, caplog):
    gpu = Gpu(3, 64, "float16", [10**6])  # no such CPU
    assert gpu.lanes.open_step(3) is None
    assert "ended" in caplog.text
    gpu.lanes.close()


@pytest.mark.parametrize("best", SHARES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_share_goes_to_where_a_layer_takes_least(best, rows):
    random = np.random.default_rng(0)
    share, steps = LaneShare(), []
    for _ in range(12_000):
        steps.append(share.of(rows))
        share.learn(rows, steps[-1], rows * (40 + 30 * abs(steps[-1] / 256 - best) + random.random()))
    assert share.all() == {{1: "1", 2: "2", 5: "8"}[rows]: best}
    settled = np.array(steps[-2048:]) / 256
    assert (settled == best).mean() > 0.9
    assert set(settled) <= set(SHARES)


def test_what_a_share_gains_less_than_two_percent_by_is_not_worth_a_change():
    share = LaneShare()
    for _ in range(5_000):
        mine = share.of(1)
        share.learn(1, mine, 100 - mine / 256)
    assert share.all() == {"1": 0.0}


def test_steps_told_of_late_or_never_do_no_harm():
    share = LaneShare()
    asked = [share.of(4) for _ in range(3_000)]
    for mine in reversed(asked):
        share.learn(4, mine, 100.0)
    assert share.all() == {"4": 0.375}
