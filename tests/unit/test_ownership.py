"""Every token has one owner, and the paged blocks of a request stay bounded whatever its length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.ownership import never_leaves_pages, resident_blocks_bound, sink_end, window_start


@st.composite
def schedules(draw):
    """(sink, window, block, steps): each step is (tokens computed before it, tokens it computes)."""
    sink, window = draw(st.integers(0, 130)), draw(st.integers(1, 200))
    block = 16 * draw(st.integers(1, 5))
    prompt = draw(st.integers(1, 700))
    chunks = draw(st.lists(st.integers(1, 150), min_size=1, max_size=12))
    steps, computed = [], 0
    while computed < prompt:
        chunk = min(chunks[len(steps) % len(chunks)], prompt - computed)
        steps.append((computed, chunk))
        computed += chunk
    for _ in range(draw(st.integers(0, 100))):
        steps.append((computed, 1))
        computed += 1
    return sink, window, block, steps


def paged_positions(computed: int, length: int, sink: int, window: int, block: int) -> list[bool]:
    """Brute force of the rule: is position p paged, for each p of a row with ``length`` tokens?"""
    start = window_start(computed, sink, window, block)
    return [p < sink_end(sink, block) or p >= start for p in range(length)]


@given(schedules())
def test_boundaries_fall_on_block_edges_and_sinks_are_paged(schedule):
    sink, window, block, steps = schedule
    assert sink <= sink_end(sink, block) < sink + block
    for computed, _ in steps:
        start = window_start(computed, sink, window, block)
        assert start % block == 0
        assert start >= sink_end(sink, block)


@given(schedules())
def test_every_token_has_one_owner_at_every_step(schedule):
    sink, window, block, steps = schedule
    for computed, chunk in steps:
        length = computed + chunk
        start = window_start(computed, sink, window, block)
        host = set(range(sink_end(sink, block), start))
        paged = {p for p, is_paged in enumerate(paged_positions(computed, length, sink, window, block)) if is_paged}
        assert not host & paged
        assert host | paged == set(range(length))


@given(schedules())
def test_host_owns_computed_tokens_alone(schedule):
    sink, window, block, steps = schedule
    for computed, _ in steps:
        start = window_start(computed, sink, window, block)
        assert start == sink_end(sink, block) or start <= computed


@given(schedules())
def test_window_start_never_decreases(schedule):
    sink, window, block, steps = schedule
    starts = [window_start(computed, sink, window, block) for computed, _ in steps]
    assert starts == sorted(starts)


@given(schedules())
def test_the_recent_window_is_paged(schedule):
    sink, window, block, steps = schedule
    for computed, chunk in steps:
        paged = paged_positions(computed, computed + chunk, sink, window, block)
        assert all(paged[max(0, computed - window) :])


@given(schedules(), st.integers(1, 3))
def test_blocks_held_stay_within_the_bound(schedule, depth):
    """Blocks are freed on settled tokens while up to ``depth`` steps are in flight."""
    sink, window, block, steps = schedule
    in_flight = max(sum(chunk for _, chunk in steps[i : i + depth]) for i in range(len(steps)))
    bound = resident_blocks_bound(sink, window, in_flight, block)
    sinks = sink_end(sink, block) // block
    for i in range(len(steps)):
        settled = steps[max(0, i - depth + 1)][0]
        allocated = -(-(steps[i][0] + steps[i][1]) // block)
        first_kept = window_start(settled, sink, window, block) // block
        assert len([b for b in range(allocated) if b < sinks or b >= first_kept]) <= bound


@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("sink", [0, 1, 16, 33])
@pytest.mark.parametrize("window", [1, 15, 16, 40])
def test_never_leaves_pages_agrees_with_brute_force(sink, window, block):
    for longest in range(1, 220):
        # The last token is only sampled, not computed: the last step sees longest - 1 computed tokens.
        leaves = any(not all(paged_positions(c, c + 1, sink, window, block)) for c in range(longest))
        assert never_leaves_pages(longest, sink, window, block) == (not leaves)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 3))
def test_manager_holds_sinks_and_window_and_returns_every_block(schedule, depth):
    from vllm.v1.core.block_pool import BlockPool

    from vllm_retrieval_attn.kvcache.manager import RetrievalManager
    from vllm_retrieval_attn.kvcache.spec import RetrievalSpec

    sink, window, block, steps = schedule
    in_flight = max(sum(chunk for _, chunk in steps[i : i + depth]) for i in range(len(steps)))
    spec = RetrievalSpec(
        block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32,
        sink_tokens=sink, window_tokens=window, in_flight_tokens=in_flight,
    )  # fmt: skip
    # A request alone must do with its bound; block 0 of the pool is the null block.
    pool = BlockPool(spec.max_admission_blocks(1 << 20) + 1, enable_caching=False, hash_block_size=block)
    free = pool.get_num_free_blocks()
    manager = RetrievalManager(
        spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=block
    )  # fmt: skip
    sinks = sink_end(sink, block) // block
    for i, (computed, chunk) in enumerate(steps):
        settled = steps[max(0, i - depth + 1)][0]
        manager.remove_skipped_blocks("r", settled)
        total = computed + chunk
        wanted = manager.get_num_blocks_to_allocate("r", total, [], computed, 0, total)
        assert wanted <= pool.get_num_free_blocks()
        assert len(manager.allocate_new_blocks("r", total, total)) == wanted
        held = manager.req_to_blocks["r"]
        first_kept = window_start(settled, sink, window, block) // block
        allocated = -(-total // block)
        assert len(held) == allocated
        real = {b for b in range(allocated) if not held[b].is_null}
        assert real == {b for b in range(allocated) if b < sinks or b >= first_kept}
        assert len({held[b].block_id for b in real}) == len(real)
        assert pool.get_num_free_blocks() == free - len(real)
    manager.free("r")
    assert pool.get_num_free_blocks() == free
