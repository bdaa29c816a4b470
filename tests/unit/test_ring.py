# SPDX-License-Identifier: Apache-2.0
"""The ring between client and lanes: right answers from slow, dead and restarted peers, and no core used idle."""

import gc
import subprocess
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.layouts import DTYPES, make_layout
from tests.unit.rings import Ring
from vllm_retrieval_attn.store.layout import ROW_GENERATION, ROW_LIMIT, SLOT_GENERATION, WORD_CLIENT_PID
from vllm_retrieval_attn.workers import client
from vllm_retrieval_attn.workers.client import WorkersLate
from vllm_retrieval_attn.workers.lane import LEADER


@pytest.fixture
def rings():
    """Makes rings; all are closed at the end."""
    made = []

    def make(*args, **kwargs):
        made.append(Ring(*args, **kwargs))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    kv_heads = draw(st.integers(1, 5))
    layout = make_layout(
        dtype, actors=draw(st.integers(1, min(3, kv_heads))), threads=draw(st.integers(1, 4)), kv_heads=kv_heads,
        group=draw(st.integers(1, 4)), dim=draw(st.sampled_from([16, 48, 64])), layers=draw(st.integers(1, 3)),
        page_tokens=draw(st.sampled_from([1, 16, 64, 128])),
    )  # fmt: skip
    longest = layout.page_tokens * layout.table_pages
    counts = st.one_of(st.integers(0, min(3, longest)), st.integers(1, longest))
    messages = st.lists(st.lists(counts, max_size=layout.max_rows), min_size=1, max_size=4)
    return dtype, layout, draw(messages), draw(st.integers(0, 2**31)), draw(st.booleans())


@settings(max_examples=40)
@given(cases())
def test_answers_equal_brute_force_attention(case):
    dtype, layout, messages, seed, elsewhere = case
    ring = Ring(layout, dtype, elsewhere=elsewhere)
    try:
        ring.start_all()
        for number, tokens in enumerate(messages):
            ring.check((seed + number) % layout.layers, tokens, seed + number)
            assert ring.client.search_stats()[2] == sum(tokens) * layout.kv_heads
    finally:
        ring.close()


def test_many_messages_in_a_row_are_answered(rings, monkeypatch):
    # A core may be late by more than the 20 ms after which a client asks; a lane whose wake-up was lost sleeps for 200.
    monkeypatch.setattr(client, "_SLICE_NS", 100_000_000)
    ring = rings(make_layout(actors=2, threads=2, kv_heads=3))
    ring.client._timeout[:] = 1, 0
    ring.start_all()
    for number in range(150):
        ring.check(number % 2, [1 + number, 3, 0, 200], number)
    assert ring.asked == 0


def test_a_leader_that_starts_late_is_waited_for(rings):
    ring = rings(make_layout(threads=3, kv_heads=2))
    for thread in range(3):
        ring.start(0, thread)
    late = threading.Timer(0.5, ring.start, (0, LEADER))
    begin = time.monotonic()
    ring.check(1, [300, 7, 64], before_collect=late.start)
    late.join()
    assert 10 <= ring.asked <= (time.monotonic() - begin) / 0.02 + 1  # every 20 ms


def test_a_restarted_lane_answers_what_its_dead_predecessor_did_not(rings):
    ring = rings(make_layout(actors=2, threads=2, kv_heads=2))
    ring.start_all()
    ring.check(0, [200, 50], 1)
    ring.stop_lanes()
    ring.on_asked = lambda: bool(ring.lanes) or ring.start_all() is None
    ring.check(1, [33, 384, 1], 2)
    assert ring.asked >= 1
    ring.check(0, [5], 3)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_process_is_replaced_by_one_that_answers(rings, elsewhere):
    ring = rings(make_layout(actors=2, kv_heads=2), elsewhere=elsewhere)
    ring.start(0, LEADER)
    ring.start(0, 0)
    children = []

    def launch():
        if not children or children[-1].poll() is not None:
            children.append(subprocess.Popen(ring.child_arguments(1, 50_000)))

    launch()
    try:
        ring.check(0, [300, 9], 1)
        children[0].kill()
        children[0].wait()
        ring.on_asked = lambda: children[-1].poll() is None
        message, _ = ring.fill(1, [9, 300], 2)
        ring.client.post(1, message)
        with pytest.raises(WorkersLate, match="are gone"):
            ring.collect(2)
        launch()
        ring.await_idle()
        ring.check(1, [9, 300], 2)
        assert len(children) == 2
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_message_that_is_late_is_not_served_and_no_other_comes_before_it_is_over(rings):
    ring = rings(make_layout(), limit_s=0.05)
    message, _ = ring.fill(0, [100])
    ring.client.post(0, message)
    begin = time.monotonic()
    with pytest.raises(WorkersLate, match=r"have not answered for 0\.05 s"):
        ring.collect(1)
    assert time.monotonic() - begin < 0.2
    with pytest.raises(WorkersLate, match="earlier message"):
        ring.client.post(0, message)
    ring.start_all()
    ring.await_idle()
    ring.client._limit_s = 30
    ring.check(1, [50], 4)
    assert ring.client.search_stats()[2] == 50


def test_stop_ends_all_lanes(rings):
    ring = rings(make_layout(actors=2, threads=2, kv_heads=2))
    ring.start_all()
    ring.check(0, [10])
    ring.client.stop()
    for lane in ring.lanes:
        lane.join(timeout=2)
        assert not lane.is_alive()
        assert lane.error is None


def test_lanes_leave_when_their_client_is_gone(rings):
    ring = rings(make_layout())
    client = subprocess.Popen(["sleep", "600"])
    ring.views.words[WORD_CLIENT_PID] = client.pid
    ring.start_all()
    ring.check(0, [10])
    assert all(lane.is_alive() for lane in ring.lanes)
    client.kill()
    client.wait()
    for lane in ring.lanes:
        lane.join(timeout=3)
        assert not lane.is_alive()


def test_idle_lanes_use_less_than_5_percent_of_a_core(rings):
    ring = rings(make_layout(threads=2))
    ring.start_all()
    ring.check(0, [100])
    time.sleep(0.1)
    clocks = [time.pthread_getcpuclockid(lane.ident) for lane in ring.lanes]
    before = sum(map(time.clock_gettime, clocks))
    time.sleep(1.0)
    assert sum(map(time.clock_gettime, clocks)) - before < 0.05


def test_a_lane_that_polls_for_long_does_not_grow_its_stack(rings):
    """In a child, since the fault of old was a crash: an alloca in the polling loop."""
    ring = rings(make_layout())
    child = subprocess.Popen(ring.child_arguments(0, 10**15))
    try:
        ring.check(0, [100], 1)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=3)
        ring.check(1, [200], 2)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


# ---- rows that are searched through an index

LONG = {"dim": 64, "page_tokens": 256, "table_pages": 40, "max_rows": 3, "indexed": True, "layers": 2}


@pytest.fixture(scope="module", params=[True, False], ids=["faiss", "auto"])
def answers(request):
    """One message with an indexed, an exact and another indexed row, answered by rings of several shapes."""
    found = {}
    for actors, threads, *elsewhere in [(1, 1), (1, 3), (2, 2), (1, 2, "elsewhere")]:
        layout = make_layout("bfloat16", kv_heads=2, group=3, actors=actors, threads=threads, **LONG)
        ring = Ring(replace(layout, most_limit=4000), "bfloat16", elsewhere=bool(elsewhere), by_faiss=request.param)
        ring.start_all()
        message, stored = ring.fill(1, [9000, 50, 2000], 5, [8960, 0, 1024])
        found[actors, threads, *elsewhere] = ring.ask(1, message)
        if (actors, threads) == (1, 3):
            found["again"] = ring.ask(1, message)
            ring.restart()
            found["restarted"] = ring.ask(1, message)
            message[:, ROW_LIMIT] = 4000
            found["many rows"] = ring.ask(1, message)
            found["wanted"] = ring.wanted(stored)
            found["read"] = ring.client.search_stats()
        ring.close()
    return found


@pytest.mark.parametrize("other", [(1, 1), (2, 2), (1, 2, "elsewhere"), "again", "restarted"])
def test_what_is_read_depends_on_no_thread_process_or_clock(answers, other):
    for one, two in zip(answers[1, 3], answers[other], strict=True):
        assert torch.equal(one, two)


def test_the_exact_row_beside_them_is_exact(answers):
    for got, want in zip(answers[1, 3], answers["wanted"], strict=True):
        torch.testing.assert_close(got[1].double(), want[1], atol=1e-5, rtol=1e-4)


def test_more_rows_come_closer_to_brute_force(answers):
    want, want_lse = answers["wanted"]
    errors = [(answers[name][0] - want).norm() / want.norm() for name in [(1, 3), "many rows"]]
    assert errors[1] < 0.6 * errors[0] < 0.6
    assert (answers["many rows"][1] - want_lse).abs().max() < 0.1


def test_rows_read_and_codes_scored_are_counted(answers):
    _, codes, rows = answers["read"]
    assert codes == 2 * (8960 + 1024)
    assert 2 * (3900 + 40 + 50 + 1000 + 976) < rows <= 2 * (4000 + 70 + 40 + 50 + 1024 + 976)


def test_a_row_whose_table_changed_hands_fails_alone(rings):
    ring = rings(make_layout(kv_heads=1, group=2, **LONG))
    ring.start_all()
    message, _ = ring.fill(0, [1500, 1300], 3, [1024, 1024])
    ring.views.slots[message[0, 0], SLOT_GENERATION] += 1
    got, _ = ring.ask(0, message)
    assert ring.failed.tolist() == [0]
    assert torch.isfinite(got[1]).all()
    message[0, ROW_GENERATION] += 1
    ring.ask(0, message)
    assert ring.failed.tolist() == []


def test_a_probed_row_that_asks_for_more_than_there_is_room_for_fails_alone(rings):
    ring = rings(make_layout(kv_heads=1, group=2, **LONG))
    ring.start_all()
    message, _ = ring.fill(0, [9000, 100], 3, [8960, 0])
    message[0, ROW_LIMIT] = 8000
    ring.ask(0, message, probe=0)
    assert ring.failed.tolist() == [0]
    message[0, ROW_LIMIT] = 1000
    ring.ask(0, message)
    assert ring.failed.tolist() == []


def test_a_row_of_no_numbers_changes_no_other(rings):
    """Weights that are no numbers stay in the histograms of their own shards."""
    ring = rings(make_layout("bfloat16", kv_heads=2, group=3, threads=2, **LONG), "bfloat16")
    ring.start_all()
    message, _ = ring.fill(0, [9000, 3000, 9000], 3, [8960, 2048, 8960])
    calm = ring.ask(0, message)
    queries = ring.queries[1].clone()
    for broken in (float("nan"), float("inf"), -float("inf")):
        ring.queries[1] = broken
        found = ring.ask(0, message)
        for one, two in zip(calm, found, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[2], two[2])
    ring.queries[1] = queries
    for one, two in zip(calm, ring.ask(0, message), strict=True):
        assert torch.equal(one, two)


def test_indexes_stay_while_their_message_is_open_and_go_when_it_is_over(rings):
    ring = rings(make_layout(kv_heads=2, group=2, **LONG))
    message, _ = ring.fill(0, [3000], 3, [2048])
    ring.views.header[:] = 0, 1, -1, 0
    ring.views.rows[:1] = message
    desk = ring.desks[0]
    desk.lay_out(0)
    known = [weakref.ref(entry.index) for entry in desk._indexes._entries.values()]
    ring.views.slots[message[0, 0], SLOT_GENERATION] = 0  # given up
    desk._indexes.drop_stale()
    gc.collect()
    assert len(known) == 2
    assert all(index() is not None for index in known)
    desk.clear()
    gc.collect()
    assert all(index() is None for index in known)


def test_the_choice_of_a_probed_row_is_kept(rings):
    ring = rings(make_layout(kv_heads=2, group=2, **LONG))
    ring.start_all()
    message, _ = ring.fill(1, [3000, 2500], 3, [2048, 2048])
    ring.ask(1, message, probe=1)
    for head in range(2):
        count, *ids = ring.views.chosen[1, head]
        assert 30 < count <= 64 + 16
        assert len(set(ids[:count])) == count
        assert 0 <= min(ids[:count]) <= max(ids[:count]) < 2048
