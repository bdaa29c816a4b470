# SPDX-License-Identifier: Apache-2.0
"""Sessions, waiting and preemption in vLLM's scheduler, without a model (scheduling.py)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.scheduling import BLOCK, PAGE, SINK, WINDOW, Simulation, Store, make_config


@pytest.fixture(scope="module")
def config():
    return make_config(10)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def simulation(config, request):
    return Simulation(config, request.param)


LONGEST = SINK + 10 * PAGE


def test_a_session_keeps_its_admission_from_chunk_to_chunk(simulation):
    for number in range(4):
        simulation.add("s", 70, 5, session=True)
        simulation.run()
        assert simulation.connector._epochs == {"s": 1}
        assert simulation.held() == {"s": -(-(simulation.scheduler.requests["s"].num_tokens - 1 - SINK) // PAGE)}
        assert len(simulation.tokens["s"]) == 5 * (number + 1)
    simulation.end("s")
    simulation.run()
    assert simulation.nothing_left()


def test_a_chunk_that_ends_early_is_written_over(simulation):
    for _ in range(12):
        simulation.stopping.add("s")
        simulation.add("s", 17, 5, session=True)
        simulation.run()
    assert simulation.finish["s"] == "stop"
    assert simulation.connector._epochs == {"s": 1}
    simulation.end("s")
    simulation.run()
    assert simulation.nothing_left()


def test_a_preempted_request_is_admitted_anew(simulation):
    simulation.add("r", 300, 40)
    while len(simulation.tokens["r"]) < 5:
        simulation.step()
    simulation.preempt()
    simulation.run()
    assert len(simulation.tokens["r"]) == 40
    assert simulation.nothing_left()


def test_a_pause_that_clears_caches_admits_anew_and_one_that_keeps_them_does_not(simulation):
    from vllm.v1.core.sched.interface import PauseState

    simulation.add("r", 300, 40)
    for clear, epoch in ((False, 1), (True, 2)):
        for _ in range(9):
            simulation.step()
        simulation.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        for _ in range(3):
            simulation.step()
        if clear:
            simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
        simulation.scheduler.set_pause_state(PauseState.UNPAUSED)
        simulation.step()
        assert simulation.connector._epochs == {"r": epoch}
    simulation.run()
    assert len(simulation.tokens["r"]) == 40
    assert simulation.nothing_left()


def test_an_id_may_be_used_again_at_once(config):
    simulation = Simulation(config)  # with steps in flight vLLM itself takes the old one's output for the new one's
    simulation.add("r", 300, 40)
    for _ in range(12):
        simulation.step()
    simulation.abort("r")
    simulation.tokens["r"].clear()
    simulation.add("r", 200, 5)
    simulation.run()
    assert simulation.nothing_left()


def test_a_session_that_outgrows_host_memory_fails_alone(simulation):
    for _ in range(3):
        simulation.add("s", 210, 5, session=True)
        simulation.run()
    assert simulation.finish["s"] == "length"
    simulation.add("s", 210, 5, session=True)
    simulation.add("short", 50, 5)
    simulation.add("long", 400, 5)
    simulation.run()
    assert simulation.finish == {"s": "error", "short": "length", "long": "length"}
    assert simulation.nothing_left()


def test_a_sessions_answer_ends_where_host_memory_does(simulation):
    simulation.add("s", 300, 5, session=True)
    simulation.run()
    simulation.add("s", 300, 500, session=True)
    simulation.run()
    assert simulation.finish["s"] == "length"
    assert simulation.scheduler.requests["s"].num_tokens == LONGEST
    assert simulation.held() == {"s": 10}
    simulation.add("s", 1, 5, session=True)
    simulation.run()
    assert simulation.finish["s"] == "error"
    assert simulation.nothing_left()


def test_whoever_wants_no_page_passes_and_the_others_come_in_order(simulation):
    simulation.add("first", 500, 30)
    simulation.step()
    simulation.add("second", 400, 5)
    simulation.add("third", 100, 5)
    simulation.add("short", 30, 5)
    order = []
    for _ in range(400):
        simulation.step()
        order += [name for name in simulation.finish if name not in order]
    assert order[:2] == ["short", "first"]
    assert sorted(order[2:]) == ["second", "third"]
    assert simulation.nothing_left()


def test_a_silent_session_keeps_out_only_who_needs_its_pages(simulation):
    simulation.add("s", 400, 5, session=True)
    simulation.run()
    simulation.add("big", 500, 5)
    simulation.add("small", 150, 5)
    simulation.run()
    assert "big" not in simulation.finish
    assert simulation.finish["small"] == "length"
    simulation.end("s")
    simulation.run()
    assert simulation.finish["big"] == "length"
    assert simulation.nothing_left()


def test_sessions_that_wait_for_each_other_do_not_do_so_for_ever(simulation):
    for name in ("a", "b"):
        simulation.add(name, 280, 5, session=True)
        simulation.run()
    assert simulation.held() == {"a": 5, "b": 5}
    for name in ("a", "b"):
        simulation.add(name, 150, 5, session=True)
    simulation.run()
    answered = [name for name in ("a", "b") if len(simulation.tokens[name]) == 10]
    assert len(answered) == 1
    simulation.end(answered[0])
    simulation.run()
    assert {name: len(tokens) for name, tokens in simulation.tokens.items()} == {"a": 10, "b": 10}
    simulation.end("b" if answered == ["a"] else "a")
    simulation.run()
    assert simulation.nothing_left()


NAMES = ["s0", "s1", "s2", "r0", "r1", "r2"]
DONE = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "step", "step", "stop", "end", "abort", "preempt", "reset"]),
        st.sampled_from(NAMES),
        st.integers(1, 320),
        st.integers(1, 30),
    ),
    min_size=10,
    max_size=60,
)


def do(simulation, what, name, tokens, new):
    scheduler = simulation.scheduler
    known, is_session = name in scheduler.requests, name.startswith("s")
    if what == "add" and is_session:
        simulation.add(name, tokens, new, session=True)
    elif what == "add":
        simulation.add(f"{name}-{len(simulation.tokens)}", tokens, new)
    elif what == "step":
        for _ in range(new):
            simulation.step()
    elif what == "stop":
        simulation.stopping.add(name)
    elif what == "end" and is_session and known:
        simulation.end(name)
    elif what == "abort":
        for one in [one for one in scheduler.requests if one.startswith(name)]:
            simulation.drain()  # vLLM 0.32 takes what is in flight for the output of the next request of that name
            simulation.abort(one)
    elif what == "preempt" and scheduler.running:
        simulation.preempt()
    elif what == "reset":
        simulation.drain()
        if all(request in scheduler.running for request in scheduler.requests.values()):  # others hold blocks
            scheduler.reset_prefix_cache(reset_running_requests=True)


def test_a_prompt_that_the_connector_brings_holds_sinks_and_window_alone(simulation):
    simulation.connector.filled = True
    simulation.stores["a"] = Store(1, list(range(100, 600)))
    simulation.add("a", 501, 20)
    simulation.step()
    (held,) = simulation.scheduler.kv_cache_manager.coordinator.single_type_managers
    blocks = held.req_to_blocks["a"]
    used = [number for number, block in enumerate(blocks) if not block.is_null]
    first = (500 - WINDOW) // BLOCK
    assert used == [*range(SINK // BLOCK), *range(first, -(-501 // BLOCK))]
    assert simulation.held()["a"] == -(-(501 - SINK) // PAGE)
    simulation.run()
    assert len(simulation.tokens["a"]) == 20
    assert simulation.nothing_left()


@settings(max_examples=300)
@given(asynchronous=st.booleans(), blocks=st.sampled_from([60, 200]), done=DONE)
def test_whatever_is_done_every_request_ends_and_nothing_is_left(config, asynchronous, blocks, done):
    simulation = Simulation(config, asynchronous, blocks)
    for step in done:
        do(simulation, *step)
    simulation.run()
    for name in [name for name in simulation.scheduler.requests if name.startswith("s")]:
        simulation.end(name)
        simulation.run()
    assert simulation.nothing_left()
