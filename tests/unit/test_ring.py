"""The ring between client and lanes: right answers from slow, dead and restarted peers, and no core used idle."""

import subprocess
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.rings import DTYPES, Ring, make_layout
from vllm_retrieval_attn.store.layout import WORD_CLIENT_PID
from vllm_retrieval_attn.workers.client import WorkersUnavailable


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
        group=draw(st.integers(1, 4)), dim=draw(st.sampled_from([16, 40, 64])), layers=draw(st.integers(1, 3)),
        page_tokens=draw(st.sampled_from([1, 16, 64, 128])),
    )  # fmt: skip
    longest = layout.page_tokens * layout.table_pages
    counts = st.one_of(st.integers(0, min(3, longest)), st.integers(1, longest))
    messages = st.lists(st.lists(counts, max_size=layout.max_rows), min_size=1, max_size=4)
    return dtype, layout, draw(messages), draw(st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_answers_equal_brute_force_attention(case):
    dtype, layout, messages, seed = case
    ring = Ring(layout, dtype)
    try:
        ring.start_all()
        for number, tokens in enumerate(messages):
            ring.check((seed + number) % layout.layers, tokens, seed + number)
            assert ring.client.search_stats()[1] == sum(tokens) * layout.kv_heads
    finally:
        ring.close()


def test_many_messages_in_a_row_are_answered(rings):
    ring = rings(make_layout(actors=2, threads=2, kv_heads=3))
    ring.start_all()
    for number in range(150):
        ring.check(number % 2, [1 + number, 3, 0, 200], number)
    assert ring.revived == 0


def test_a_lane_that_starts_late_is_waited_for(rings):
    ring = rings(make_layout(threads=3, kv_heads=2))
    ring.start(0, 0)
    ring.start(0, 2)
    late = threading.Timer(0.5, ring.start, (0, 1))
    ring.check(1, [300, 7, 64], before_collect=late.start)
    late.join()
    assert 2 <= ring.revived <= 10  # about every 100 ms


def test_a_restarted_lane_answers_what_its_dead_predecessor_did_not(rings):
    ring = rings(make_layout(actors=2, threads=2, kv_heads=2))
    ring.start_all()
    ring.check(0, [200, 50], 1)
    ring.stop_lanes()
    ring.on_revive = lambda: ring.start_all() if not ring.lanes else None
    ring.check(1, [33, 384, 1], 2)
    assert ring.revived >= 1
    ring.check(0, [5], 3)


def test_a_killed_process_is_replaced_by_one_that_answers(rings):
    ring = rings(make_layout(threads=2, kv_heads=2))
    ring.start(0, 0)
    children = []

    def launch():
        if not children or children[-1].poll() is not None:
            children.append(subprocess.Popen(ring.child_arguments(0, 1, 50_000)))

    launch()
    try:
        ring.check(0, [300, 9], 1)
        children[0].kill()
        children[0].wait()
        ring.on_revive = launch
        ring.check(1, [9, 300], 2)
        assert len(children) == 2
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_revive_may_give_up_and_an_abandoned_message_is_not_served(rings):
    ring = rings(make_layout())
    message, _ = ring.fill(0, [100])
    ring.client.post(0, message)

    def give_up():
        raise WorkersUnavailable("gone")

    ring.on_revive = give_up
    with pytest.raises(WorkersUnavailable):
        ring.collect(1)
    ring.client.abandon()
    ring.on_revive = lambda: None
    ring.start_all()
    ring.check(1, [50], 4)
    assert ring.client.search_stats()[1] == 50


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
    client = subprocess.Popen(["sleep", "60"])
    ring.views.words[WORD_CLIENT_PID] = client.pid
    lane = ring.start(0, 0)
    ring.check(0, [10])
    assert lane.is_alive()
    client.kill()
    client.wait()
    lane.join(timeout=3)
    assert not lane.is_alive()


def test_an_idle_lane_uses_less_than_5_percent_of_a_core(rings):
    ring = rings(make_layout())
    lane = ring.start(0, 0)
    ring.check(0, [100])
    time.sleep(0.1)
    clock = time.pthread_getcpuclockid(lane.ident)
    before = time.clock_gettime(clock)
    time.sleep(1.0)
    assert time.clock_gettime(clock) - before < 0.05


def test_a_lane_that_polls_for_long_does_not_grow_its_stack(rings):
    """In a child, since the fault of old was a crash: an alloca in the polling loop."""
    ring = rings(make_layout())
    child = subprocess.Popen(ring.child_arguments(0, 0, 10**15))
    try:
        ring.check(0, [100], 1)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=3)
        ring.check(1, [200], 2)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
