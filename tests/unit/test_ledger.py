# SPDX-License-Identifier: Apache-2.0
"""The scheduler's account of host memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.core.ledger import HostLedger
from vllm_retrieval_attn.core.ownership import Split

SINK, WINDOW, BLOCK, PAGE = 32, 48, 16, 64
SPLIT = Split(SINK, WINDOW, 0, BLOCK)
IDS = [f"r{i}" for i in range(6)]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "hold", "release", "forget"]), st.sampled_from(IDS), st.integers(0, 1500)
    ),
    max_size=60,
)  # fmt: skip


def ledger(pages: int = 10) -> HostLedger:
    return HostLedger(pages, PAGE, SPLIT)


def pages_of(tokens: int) -> int:
    return -(-max(0, tokens - SINK) // PAGE)


@settings(max_examples=300)
@given(st.integers(0, 30), OPERATIONS)
def test_pages_held_follow_the_requests_and_never_exceed_capacity(capacity, operations):
    book = ledger(capacity)
    held: dict[str, int] = {}
    arrived: set[str] = set()
    resident: set[str] = set()
    for operation, request, tokens in operations:
        if operation == "arrive":
            if request in arrived:
                continue
            arrived.add(request)
            book.arrived(request, tokens)
            if capacity == 0 or SPLIT.never_leaves_pages(tokens):
                resident.add(request)
        elif request not in arrived:
            continue
        elif operation == "hold":
            more = 0 if request in resident else max(0, pages_of(tokens) - held.get(request, 0))
            assert book.required(request, tokens) == more
            assert book.fits(request, tokens) == (more <= book.free_pages)
            if book.fits(request, tokens):
                book.hold(request, tokens)
                held[request] = held.get(request, 0) + more
                assert book.required(request, tokens) == 0
                assert book.fits(request, tokens)
            else:
                with pytest.raises(RuntimeError, match=request):
                    book.hold(request, tokens)
        else:
            held.pop(request, None)
            book.release(request)
            if operation == "forget":
                book.forget(request)
                arrived.discard(request)
                resident.discard(request)
        assert {r: book.held_pages(r) for r in book.held} == {r: n for r, n in held.items() if n}
        assert book.free_pages == capacity - sum(held.values())
        assert 0 <= book.free_pages <= capacity
    for request in arrived:
        book.forget(request)
    assert book.free_pages == capacity
    assert not book.held


def test_a_request_that_never_leaves_the_pages_takes_nothing():
    book = ledger(1)
    book.arrived("short", SINK + WINDOW)
    assert not book.needs_host("short")
    assert book.required("short", SINK + WINDOW) == 0
    book.hold("short", SINK + WINDOW)
    assert book.free_pages == 1


def test_a_preempted_request_keeps_its_kind_and_a_forgotten_one_does_not():
    book = ledger()
    book.arrived("short", 10)
    book.release("short")
    assert not book.needs_host("short")
    book.forget("short")
    assert book.needs_host("short")


def test_without_host_pages_every_request_is_resident():
    book = ledger(0)
    book.arrived("long", 10**6)
    assert book.fits("long", 10**6)


def test_holding_less_gives_nothing_back():
    book = ledger()
    book.arrived("r", 10**4)
    book.hold("r", SINK + 3 * PAGE)
    book.hold("r", SINK + 1)
    assert book.held_pages("r") == 3


def test_the_sink_region_costs_no_page():
    book = ledger()
    book.arrived("r", 10**4)
    assert [book.required("r", SINK + more) for more in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
