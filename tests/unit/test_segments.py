"""The life cycle of a segment and of a request's store."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_retrieval_attn.store.segments import RequestStore, Segment, SegmentState

OPEN, SEALED, INDEXED = SegmentState.OPEN, SegmentState.SEALED, SegmentState.INDEXED
LEGAL = {(OPEN, SEALED), (SEALED, INDEXED)}


@pytest.mark.parametrize("state", SegmentState)
@pytest.mark.parametrize("to", SegmentState)
def test_only_steps_of_its_life_are_taken(state, to):
    segment = Segment(3, state)
    if (state, to) in LEGAL:
        segment.move(to)
        assert segment.state is to
    else:
        with pytest.raises(ValueError, match="segment 3"):
            segment.move(to)
        assert segment.state is state


@given(st.integers(1, 200).map(lambda n: 64 * n), st.lists(st.integers(0, 3000), max_size=30))
def test_a_segment_is_sealed_exactly_when_it_is_full(segment_tokens, arrivals):
    store = RequestStore("r", 1, 0, segment_tokens)
    tokens, sealed = 0, []
    for count in arrivals:
        tokens += count
        sealed += [segment.number for segment in store.written(tokens)]
        assert store.tokens == tokens
        assert len(store.segments) == -(-tokens // segment_tokens)
        for number, segment in enumerate(store.segments):
            assert segment.number == number
            assert segment.state is (SEALED if (number + 1) * segment_tokens <= tokens else OPEN)
        assert sealed == list(range(tokens // segment_tokens))


def test_tokens_never_go_back():
    store = RequestStore("req", 1, 0, 64)
    store.written(10)
    with pytest.raises(ValueError, match="req"):
        store.written(9)
    assert store.tokens == 10


def test_writing_keeps_indexed_segments_indexed():
    store = RequestStore("r", 1, 0, 64)
    for segment in store.written(128):
        segment.move(INDEXED)
    assert [segment.number for segment in store.written(192)] == [2]
    assert [segment.state for segment in store.segments] == [INDEXED, INDEXED, SEALED]


def test_only_leading_indexed_segments_within_the_host_tokens_count():
    store = RequestStore("r", 1, 0, 64)
    store.written(300)
    for number in (0, 1, 3):
        store.segments[number].move(INDEXED)
    assert [store.indexed(tokens) for tokens in (0, 63, 64, 127, 128, 300)] == [0, 0, 1, 1, 2, 2]
    store.segments[2].move(INDEXED)
    assert [store.indexed(tokens) for tokens in (191, 192, 255, 256, 300)] == [2, 3, 3, 4, 4]
