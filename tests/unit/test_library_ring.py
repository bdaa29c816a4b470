"""The kinds to compare with behind the ring: Python lanes, indexes in the process."""

import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.indexed_ring import IndexedRing, layout
from vllm_retrieval_attn.store.layout import ACTOR_JOBS, ROW_BUDGET, WORD_JOBS
from vllm_retrieval_attn.workers.builder import Builder


def served(ring, tokens, seed, budget):
    """The ring's answer to a random message and that of brute force."""
    message, stored = ring.fill(1, tokens, seed)
    ring.pages[:, 0] = 0.0  # the other layer is indexed too
    ring.index_rows(message)
    message[:, ROW_BUDGET] = budget
    ring.start_all()
    ring.client.post(1, message)
    return ring.collect(len(tokens)), ring.wanted(message, stored)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    actors=st.integers(1, 2),
    group=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
)
def test_segments_and_open_rows_merge_to_brute_force(tokens, actors, group, dtype, seed):
    shape = layout("flat", actors=actors, kv_heads=3, group=group, dim=16, dtype=dtype)
    ring = IndexedRing(shape, dtype, "flat")
    try:
        (got, got_lse), (want, want_lse) = served(ring, tokens, seed, 500_000)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    finally:
        ring.close()


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "roar"])
def test_a_larger_budget_comes_closer(kind):
    errors, scored = [], []
    for budget in (100_000, 999_999):
        ring = IndexedRing(layout(kind, kv_heads=1, group=2, dim=16), "float32", kind)
        try:
            (got, _), (want, _) = served(ring, [900], 5, budget)
            errors.append(float((got - want).norm() / want.norm()))
            scored.append(ring.client.search_stats()[1])
        finally:
            ring.close()
    assert errors[1] < 0.5 * errors[0]
    assert scored[0] < scored[1] <= 2 * 900 * 1.2  # hnsw scores some keys twice


def test_what_died_with_a_process_is_scanned_exactly_and_built_again():
    ring = IndexedRing(layout("ivf", kv_heads=1, group=2, dim=16), "float32", "ivf")
    try:
        (before, _), (want, _) = served(ring, [900], 7, 100_000)
        assert not torch.allclose(before.double(), want, atol=1e-3)
        message = ring.client._views.rows[:1].copy()
        ring.stop_lanes()
        ring.builders[0].stop()
        ring.works[0] = ring.make_work(0)
        ring.start_all()
        ring.client.post(1, message)
        exact, _ = ring.collect(1)
        torch.testing.assert_close(exact.double(), want, atol=1e-5, rtol=1e-4)
        ring.builders[0] = Builder(ring.layout, ring.views, 0, 1, ring.works[0], lost=True)
        ring.builders[0].start()
        word, deadline = ring.views.actor_word(0, ACTOR_JOBS), time.monotonic() + 60
        while ring.views.words[word] != ring.views.words[WORD_JOBS] and time.monotonic() < deadline:
            time.sleep(0.002)
        ring.client.post(1, message)
        again, _ = ring.collect(1)
        torch.testing.assert_close(again, before, atol=1e-5, rtol=1e-4)
    finally:
        ring.close()
