"""Indexed segments behind the ring, and the life of a build: queued, dropped, resumed."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.indexed_ring import SEGMENT, IndexedRing, layout
from vllm_retrieval_attn.store.indexing import IndexQueue
from vllm_retrieval_attn.store.layout import (
    ACTOR_JOBS,
    ACTOR_SLAB,
    ROW_BUDGET,
    ROW_RERANK,
    ROW_TAIL,
    WORD_JOBS,
)
from vllm_retrieval_attn.store.segments import RequestStore, SegmentState


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    actors=st.integers(1, 2),
    threads=st.integers(1, 3),
    group=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
)
def test_a_full_budget_over_indexed_segments_equals_brute_force(tokens, actors, threads, group, dtype, seed):
    ring = IndexedRing(layout(actors=actors, threads=threads, kv_heads=2, group=group, dim=16, dtype=dtype), dtype)
    try:
        message, stored = ring.fill(1, tokens, seed)
        ring.pages[:, 0] = 0.0  # the other layer is indexed too
        ring.index_rows(message)
        message[:, ROW_BUDGET], message[:, ROW_RERANK], message[:, ROW_TAIL] = 999_999, 1 << 20, seed % 2
        ring.start_all()
        ring.client.post(1, message)
        got, got_lse = ring.collect(len(tokens))
        want, want_lse = ring.wanted(message, stored)
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-4, rtol=1e-4)
    finally:
        ring.close()


def test_a_small_budget_comes_close_and_reads_less():
    ring = IndexedRing(layout(kv_heads=1, dim=16, threads=2, dtype="bfloat16"), "bfloat16")
    try:
        message, stored = ring.fill(0, [900], 3)
        ring.pages[:, 1] = 0.0
        ring.index_rows(message)
        message[:, ROW_BUDGET], message[:, ROW_RERANK], message[:, ROW_TAIL] = 300_000, 64, 1
        ring.start_all()
        ring.client.post(0, message)
        got, got_lse = ring.collect(1)
        want, want_lse = ring.wanted(message, stored)
        # Random keys: hardly anything to cluster. The tail still knows about how much there is.
        assert (got - want).norm() < (want.norm())
        assert (got_lse - want_lse).abs().max() < 0.3
        assert ring.client.search_stats()[1] < 900
    finally:
        ring.close()


@pytest.fixture
def queue():
    shape = layout(kv_heads=1, dim=16)
    ring = IndexedRing(shape)
    yield ring
    ring.close()


def stores(ring, tokens):
    made = []
    for slot, count in enumerate(tokens):
        ring.views.tables[slot] = np.arange(16) + 16 * slot
        store = RequestStore(f"r{slot}", 1, slot, SEGMENT)
        made.append((store, store.written(count)))
    ring.pages[:] = torch.randn(ring.pages.shape)
    ring.fill_statistics()
    return made


def test_more_segments_than_slabs_wait_and_are_indexed_later(queue):
    made = stores(queue, [1024, 1024, 1024, 1024])
    for store, segments in made:
        for segment in segments:
            queue.index.add(store, segment)
    assert queue.index.used_slabs == 12
    assert queue.index.pending == 16
    for builder in queue.builders:
        builder.start()
    deadline = time.monotonic() + 60
    while queue.index.built < 12 and time.monotonic() < deadline:
        queue.index.poll()
        time.sleep(0.002)
    assert queue.index.pending == 4
    queue.index.release(made[0][0])
    queue.run_builders()
    assert queue.index.built == 16
    assert all(segment.state is SegmentState.INDEXED for _, segments in made[1:] for segment in segments)
    assert queue.index.seconds_left() == 0.0


def test_a_build_whose_request_ended_is_dropped(queue):
    ((store, segments),) = stores(queue, [512])
    for segment in segments:
        queue.index.add(store, segment)
    queue.index.release(store)
    queue.views.tables[0] = -(1 << 40)
    assert queue.index.used_slabs == 0
    queue.run_builders()
    words, views = queue.views.words, queue.views
    deadline = time.monotonic() + 30
    while words[views.actor_word(0, ACTOR_JOBS)] != words[WORD_JOBS] and time.monotonic() < deadline:
        time.sleep(0.002)
    assert words[views.actor_word(0, ACTOR_JOBS)] == 2
    assert (views.built == 0).all()
    assert queue.builders[0].is_alive()
    assert queue.index.built == 0


def test_a_slab_that_is_being_written_is_not_given_away(queue):
    word = queue.views.actor_word(0, ACTOR_SLAB)
    queue.views.words[word] = 0  # the first that would be given
    ((store, segments),) = stores(queue, [256])
    queue.index.add(store, segments[0])
    assert store.slabs[0] != 0
    queue.views.words[word] = -1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_slabs_have_one_owner_and_all_come_back(queue, seed):
    chance = random.Random(seed)
    queue.index = IndexQueue(queue.layout, queue.views)
    live: dict[int, tuple[RequestStore, list]] = {}
    tokens: dict[int, int] = {}
    for _ in range(60):
        slot = chance.randrange(4)
        if slot not in live:
            live[slot], tokens[slot] = (RequestStore(f"r{slot}", 1, slot, SEGMENT), []), 0
        store, _ = live[slot]
        act = chance.random()
        if act < 0.5:
            tokens[slot] = min(1024, tokens[slot] + chance.randrange(400))
            for segment in store.written(tokens[slot]):
                queue.index.add(store, segment)
        elif act < 0.8:
            for build in queue.index._pending[: chance.randrange(4)]:
                queue.views.built[build.slab] = build.generation
            queue.index.poll()
        else:
            queue.index.release(store)
            del live[slot]
        owned = [slab for store, _ in live.values() for slab in store.slabs.values()]
        assert len(set(owned)) == len(owned) == queue.index.used_slabs
        for store, _ in live.values():
            for segment in store.segments:
                if segment.state is SegmentState.INDEXED:
                    slab = store.slabs[segment.number]
                    assert queue.views.built[slab].min() == queue.views.generations[slab] > 0
    for store, _ in live.values():
        queue.index.release(store)
    assert queue.index.used_slabs == 0
    assert queue.index.pending == 0
