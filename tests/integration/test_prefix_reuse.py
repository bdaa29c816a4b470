# SPDX-License-Identifier: Apache-2.0
"""What is reused of a prompt, in vLLM's scheduler without a model (scheduling.py). Tokens on the host are checked."""

import functools
import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import BlockRemoved

from tests.integration.scheduling import BLOCK, PAGE, SINK, Simulation, make_config

PROMPT = SINK + 5 * PAGE + 3 * BLOCK + 5


@functools.cache
def shared_config():
    return make_config(20, reuse=True)


@pytest.fixture
def config():
    return shared_config()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def simulation(config, request):
    return Simulation(config, request.param)


def reused(simulation, name):
    return simulation.connector.log._cached.get(name)


def finish(simulation, *names):
    """Run to the end; tokens of each that were there at its admission."""
    found = {}
    for _ in range(2000):
        simulation.step()
        found |= {name: reused(simulation, name) for name in names if reused(simulation, name) is not None}
        if not simulation.scheduler.has_unfinished_requests():
            break
    simulation.run()
    return [found[name] for name in names]


def test_the_same_prompt_again_computes_one_block_at_most(simulation):
    simulation.add("a", PROMPT, 5)
    assert finish(simulation, "a") == [0]
    simulation.add("b", PROMPT, 5)
    assert finish(simulation, "b") == [(PROMPT - 1) // BLOCK * BLOCK]
    assert simulation.nothing_left()


def test_another_question_on_a_document_begins_where_they_part(simulation):
    simulation.add("a", PROMPT, 5, own=30, branch=1)
    simulation.add("b", PROMPT, 5, own=30, branch=2)
    first, second = finish(simulation, "a", "b")
    assert (first, second) == (0, (PROMPT - 30) // BLOCK * BLOCK)


def test_questions_at_once_compute_and_store_the_document_once(simulation):
    names = [f"q{i}" for i in range(8)]
    for number, name in enumerate(names):
        simulation.add(name, PROMPT, 12, own=10, branch=number + 1)
    most = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        prefixes = simulation.ledger.prefixes
        busy = simulation.ledger._own + len(prefixes.kept) - len(prefixes.idle)
        most = max(most, busy - PROMPT // PAGE)
    assert most <= 2 * len(names)
    assert prefixes.evicted == 0
    simulation.run()
    assert simulation.nothing_left()


def test_a_second_turn_begins_after_the_first_answer(simulation):
    simulation.add("a", 300, 40)
    finish(simulation, "a")
    request = [100 + i for i in range(300)] + simulation.tokens["a"] + [5] * 30
    simulation.add_ids("b", request, 5)
    (cached,) = finish(simulation, "b")
    assert cached == 339 // BLOCK * BLOCK


def test_a_preempted_request_resumes_from_its_pages(simulation):
    simulation.add("r", 300, 60)
    while len(simulation.tokens["r"]) < 30:
        simulation.step()
    simulation.preempt()
    for _ in range(2):
        simulation.step()
    assert reused(simulation, "r") >= (329 - 2) // BLOCK * BLOCK
    simulation.run()
    assert len(simulation.tokens["r"]) == 60
    assert simulation.nothing_left()


@pytest.mark.parametrize("apart", ["salt", "skip"])
def test_salts_share_nothing_and_who_skips_the_cache_reads_nothing(simulation, apart):
    simulation.add("a", PROMPT, 5)
    finish(simulation, "a")
    simulation.add("b", PROMPT, 5, **({"cache_salt": "other"} if apart == "salt" else {}))
    if apart == "skip":
        simulation.scheduler.requests["b"].skip_reading_prefix_cache = True
    assert finish(simulation, "b") == [0]


def test_a_reset_forgets_all(simulation):
    simulation.add("a", PROMPT, 5)
    finish(simulation, "a")
    assert simulation.scheduler.reset_prefix_cache(reset_connector=True)
    assert not simulation.ledger.prefixes.kept
    simulation.add("b", PROMPT, 5)
    assert finish(simulation, "b") == [0]


def test_what_was_not_used_for_longest_is_dropped_when_memory_is_wanted(simulation):
    for number in range(6):  # 6 pages each, 20 there are
        simulation.add(f"r{number}", PROMPT, 5, own=PROMPT, branch=number + 1)
        finish(simulation, f"r{number}")
    assert simulation.ledger.prefixes.evicted >= 12
    simulation.add("old", PROMPT, 5, own=PROMPT, branch=1)
    assert finish(simulation, "old") == [0]
    simulation.add("new", PROMPT, 5, own=PROMPT, branch=6)
    (cached,) = finish(simulation, "new")
    assert cached >= PROMPT - BLOCK - 5


def test_a_failed_request_leaves_nothing_of_what_it_generated(simulation):
    from vllm.v1.request import RequestStatus

    simulation.add("a", 300, 60)
    while len(simulation.tokens["a"]) < 40:
        simulation.step()
    simulation.scheduler.finish_requests("a", RequestStatus.FINISHED_ERROR)
    simulation.run()
    simulation.add_ids("b", [100 + i for i in range(300)] + [7] * 40, 5)
    assert finish(simulation, "b") == [300 // BLOCK * BLOCK]


def test_events_tell_what_can_be_matched(config):
    simulation, told = Simulation(config), []
    simulation.connector._reuse._wants_events = True
    simulation.scheduler.kv_event_publisher = SimpleNamespace(publish=lambda batch: told.extend(batch.events))
    simulation.add("a", PROMPT, 5)
    simulation.run()
    hashes = [name for event in told for name in event.block_hashes]
    assert len(hashes) == len(set(hashes)) == PROMPT // BLOCK
    tokens = [token for event in told for token in event.token_ids]
    assert tokens == list(range(100, 100 + PROMPT // BLOCK * BLOCK))
    for before, event in itertools.pairwise(told):
        assert event.parent_block_hash == before.block_hashes[-1]
    told.clear()
    simulation.connector.reset_cache()
    simulation.add("b", 20, 2)
    simulation.run()
    (removed,) = [event for event in told if isinstance(event, BlockRemoved)]
    assert set(removed.block_hashes) == set(hashes[SINK // BLOCK :])


DONE = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 450), st.integers(1, 60), st.sampled_from([0, 1, 17, 64, 200]),
            st.integers(1, 3),
        ),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("preempt")),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("reset")),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300)
@given(asynchronous=st.booleans(), blocks=st.sampled_from([60, 200]), done=DONE)
def test_whatever_is_shared_every_token_is_the_prompts_own(asynchronous, blocks, done):
    simulation, number = Simulation(shared_config(), asynchronous, blocks), 0
    for what, *given_ in done:
        if what == "add":
            prompt, new, own, branch = given_
            simulation.add(f"r{number}", prompt, new, own=min(own, prompt), branch=branch)
            number += 1
        elif what == "step":
            for _ in range(given_[0]):
                simulation.step()
        elif what == "preempt" and simulation.scheduler.running:
            simulation.preempt()
        elif what == "abort" and f"r{given_[0]}" in simulation.scheduler.requests:
            simulation.abort(f"r{given_[0]}")
        elif what == "reset":
            simulation.connector.reset_cache()
        check(simulation.ledger)
    simulation.run()
    simulation.add("last", 1, 1)  # a step that tells the worker what was dropped after the one before
    simulation.run()
    assert simulation.nothing_left()
    check(simulation.ledger)
    assert simulation.ledger.free_pages == simulation.ledger.pages
    assert simulation.kept.keys() == simulation.ledger.prefixes.kept.keys()


def check(ledger):
    """Users and account follow from who holds what."""
    prefixes, users = ledger.prefixes, dict.fromkeys(ledger.prefixes.kept, 0)
    for held in ledger.held.values():
        for page in [*held.pages, held.match.source]:
            if page is not None:
                users[page] += 1
    assert {number: page.users for number, page in prefixes.kept.items()} == users
    assert set(prefixes.idle) == {number for number, count in users.items() if count == 0}
    assert ledger._own == sum(held.own for held in ledger.held.values())
    assert ledger._own + len(prefixes.kept) <= ledger.pages
    assert 0 <= ledger.free_pages <= ledger.pages
    for name, (number, index) in prefixes._where.items():
        assert prefixes.kept[number].hashes[index] == name
