# SPDX-License-Identifier: Apache-2.0
"""Every token has one owner, and the paged blocks of a request stay bounded whatever its length."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.core.ownership import INDEX_BLOCK, INDEX_LAG, INDEX_LEAST, Split

SPLITS = st.builds(
    Split,
    sink_tokens=st.integers(0, 130),
    window_tokens=st.integers(1, 200),
    resident_tokens=st.integers(0, 800),
    block_size=st.integers(1, 5).map(lambda n: 16 * n),
)


@st.composite
def schedules(draw):
    """(split, steps): each step is (tokens computed before it, tokens it computes); some end below the resident tokens,
    some far beyond."""
    split = draw(SPLITS)
    prompt = draw(st.integers(1, 700) | st.integers(split.resident_tokens + 1, split.resident_tokens + 700))
    chunks = draw(st.lists(st.integers(1, 150), min_size=1, max_size=12))
    steps, computed = [], 0
    while computed < prompt:
        chunk = min(chunks[len(steps) % len(chunks)], prompt - computed)
        steps.append((computed, chunk))
        computed += chunk
    for _ in range(draw(st.integers(0, 100))):
        steps.append((computed, 1))
        computed += 1
    return split, steps


def rule(computed: int, split: Split) -> int:
    """W0 as the module's documentation has it, in other words."""
    sinks = 0
    while sinks < split.sink_tokens:
        sinks += split.block_size
    if computed <= split.resident_tokens:
        return sinks
    below_window = [b for b in range(0, computed, split.block_size) if b <= computed - split.window_tokens]
    return max([sinks, *below_window])


def is_paged(computed: int, length: int, split: Split) -> list[bool]:
    """Is position p paged, for each p of a row with ``length`` tokens?"""
    start = split.window_start(computed)
    return [p < split.sink_end or p >= start for p in range(length)]


@given(SPLITS, st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_window_starts_are_the_rule_row_by_row(split, computed):
    edges = [split.resident_tokens, split.resident_tokens + 1, split.sink_end + split.window_tokens]
    rows = computed + edges
    starts = split.window_starts(np.array(rows))
    assert starts.dtype == np.int64
    assert starts.tolist() == [split.window_start(c) for c in rows] == [rule(c, split) for c in rows]


@given(schedules())
def test_boundaries_fall_on_block_edges_and_sinks_are_paged(schedule):
    split, steps = schedule
    assert split.sink_tokens <= split.sink_end < split.sink_tokens + split.block_size
    for computed, _ in steps:
        start = split.window_start(computed)
        assert start % split.block_size == 0
        assert start >= split.sink_end


@given(schedules())
def test_every_token_has_one_owner_at_every_step(schedule):
    split, steps = schedule
    for computed, chunk in steps:
        length = computed + chunk
        host = set(range(split.sink_end, split.window_start(computed)))
        paged = {p for p, here in enumerate(is_paged(computed, length, split)) if here}
        assert not host & paged
        assert host | paged == set(range(length))


@given(schedules())
def test_host_owns_computed_tokens_alone(schedule):
    split, steps = schedule
    for computed, _ in steps:
        start = split.window_start(computed)
        assert start == split.sink_end or start <= computed


@given(schedules())
def test_window_start_never_decreases(schedule):
    split, steps = schedule
    starts = [split.window_start(computed) for computed, _ in steps]
    assert starts == sorted(starts)


@given(schedules())
def test_the_recent_window_is_paged(schedule):
    split, steps = schedule
    for computed, chunk in steps:
        paged = is_paged(computed, computed + chunk, split)
        assert all(paged[max(0, computed - split.window_tokens) :])


@given(SPLITS)
def test_a_row_is_wholly_paged_up_to_the_resident_tokens(split):
    for computed in range(split.resident_tokens + 1):
        assert split.window_start(computed) == split.sink_end
    assert split.never_leaves_pages(split.resident_tokens + 1)


@given(SPLITS)
def test_a_row_beyond_the_resident_tokens_keeps_its_window_alone(split):
    far = split.resident_tokens + split.sink_end + split.window_tokens + split.block_size
    assert far - split.window_start(far) < split.window_tokens + split.block_size
    assert not split.never_leaves_pages(far + 1)


@given(schedules(), st.integers(1, 3))
def test_blocks_held_stay_within_the_bound(schedule, depth):
    """Blocks are freed on settled tokens while up to ``depth`` steps are in flight."""
    split, steps = schedule
    block = split.block_size
    in_flight = max(sum(chunk for _, chunk in steps[i : i + depth]) for i in range(len(steps)))
    sinks = split.sink_end // block
    for i in range(len(steps)):
        settled = steps[max(0, i - depth + 1)][0]
        allocated = -(-(steps[i][0] + steps[i][1]) // block)
        first_kept = split.window_start(settled) // block
        assert len([b for b in range(allocated) if b < sinks or b >= first_kept]) <= split.blocks_bound(in_flight)


@given(SPLITS, st.integers(1, 300))
def test_the_bound_on_blocks_is_at_most_two_above_what_is_needed(split, in_flight):
    block = split.block_size
    needed = 0
    for settled in range(split.resident_tokens + split.sink_end + split.window_tokens + 2 * block):
        allocated = -(-(settled + in_flight) // block)
        needed = max(needed, allocated - (split.window_start(settled) - split.sink_end) // block)
    assert needed <= split.blocks_bound(in_flight) <= needed + 2


@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("sink", [0, 1, 16, 33])
@pytest.mark.parametrize("window", [1, 15, 16, 40])
@pytest.mark.parametrize("resident", [0, 47, 120])
def test_never_leaves_pages_agrees_with_brute_force(sink, window, resident, block):
    split = Split(sink, window, resident, block)
    leaves = False
    for longest in range(1, 220):
        # The last token is only sampled, not computed: the last step sees longest - 1 computed tokens.
        leaves = leaves or not all(is_paged(longest - 1, longest, split))
        assert split.never_leaves_pages(longest) == (not leaves)


LONG_SPLITS = st.builds(
    Split,
    sink_tokens=st.integers(0, 130),
    window_tokens=st.integers(1, 1500),
    resident_tokens=st.integers(0, 6000),
    block_size=st.integers(1, 5).map(lambda n: 16 * n),
)


@given(SPLITS | LONG_SPLITS, st.integers(0, 4000), st.integers(1, 300))
def test_indexed_tokens_are_old_host_tokens_in_whole_blocks(split, first, step):
    counts = [(computed, split.indexed_tokens(computed)) for computed in range(first, first + 10 * step, step)]
    for computed, indexed in counts:
        host = split.window_start(computed) - split.sink_end
        assert indexed == 0 or 1024 <= indexed <= host
        assert indexed % 32 == 0
        assert indexed == 0 or split.sink_end + indexed <= computed - 512
        if indexed == 0:
            assert host < 1024 or computed - 512 - split.sink_end < 1024
        else:
            assert min(host, computed - 512 - split.sink_end) - indexed < 32
    assert counts == sorted(counts, key=lambda count: count[1])


def test_the_constants_of_indexing_fit_each_other():
    assert (INDEX_LAG, INDEX_BLOCK, INDEX_LEAST) == (512, 32, 1024)
    assert INDEX_LEAST % INDEX_BLOCK == 0


@settings(max_examples=60)
@given(schedules(), st.integers(1, 3))
def test_manager_holds_sinks_and_window_and_returns_every_block(schedule, depth):
    from vllm.v1.core.block_pool import BlockPool

    from vllm_retrieval_attn.plugin.manager import RetrievalManager
    from vllm_retrieval_attn.plugin.spec import RetrievalSpec

    split, steps = schedule
    block = split.block_size
    in_flight = max(sum(chunk for _, chunk in steps[i : i + depth]) for i in range(len(steps)))
    spec = RetrievalSpec(
        block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32, sink_tokens=split.sink_tokens,
        window_tokens=split.window_tokens, resident_tokens=split.resident_tokens, in_flight_tokens=in_flight,
    )  # fmt: skip
    assert spec.split == split
    # A request alone must do with its bound; block 0 of the pool is the null block.
    pool = BlockPool(spec.max_admission_blocks(1 << 20) + 1, enable_caching=False, hash_block_size=block)
    free = pool.get_num_free_blocks()
    manager = RetrievalManager(
        spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=block
    )  # fmt: skip
    sinks = split.sink_end // block
    for i, (computed, chunk) in enumerate(steps):
        settled = steps[max(0, i - depth + 1)][0]
        manager.remove_skipped_blocks("r", settled)
        total = computed + chunk
        wanted = manager.get_num_blocks_to_allocate("r", total, [], computed, 0, total)
        assert wanted <= pool.get_num_free_blocks()
        assert len(manager.allocate_new_blocks("r", total, total)) == wanted
        held = manager.req_to_blocks["r"]
        first_kept = split.window_start(settled) // block
        allocated = -(-total // block)
        assert len(held) == allocated
        real = {b for b in range(allocated) if not held[b].is_null}
        assert real == {b for b in range(allocated) if b < sinks or b >= first_kept}
        assert len({held[b].block_id for b in real}) == len(real)
        assert pool.get_num_free_blocks() == free - len(real)
    manager.free("r")
    assert pool.get_num_free_blocks() == free
