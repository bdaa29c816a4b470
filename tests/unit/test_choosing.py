# SPDX-License-Identifier: Apache-2.0
"""Choosing rows in Numba against its plain twin, and the Faiss shards against brute force."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_retrieval_attn.index.choosing as fast
from vllm_retrieval_attn.index.choosing import REST, choice_scratch
from vllm_retrieval_attn.index.coordinates import REFERENCE
from vllm_retrieval_attn.index.head import HeadIndex, found_for
from vllm_retrieval_attn.index.native import native, search_above
from vllm_retrieval_attn.index.packing import BLOCK, SAMPLE, STEP, pack, packed_bytes
from vllm_retrieval_attn.index.scan import CAN_SCAN, scan_above, scan_scratch
from vllm_retrieval_attn.index.search import MOST
from vllm_retrieval_attn.index.shard import LEVELS, SHARD_TOKENS, Shard
from vllm_retrieval_attn.sketch import sampling
from vllm_retrieval_attn.sketch.sampling import Limits
from vllm_retrieval_attn.sketch.space import Space, balanced_for, rotated


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_head(found: fast.Found, shard: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of a shard's candidates, as views."""
    part = slice(*found.starts[shard, head : head + 2])
    return found.scores[shard, part], found.ids[shard, part]


def candidates(seed: int, sizes: list[int], group: int, k: int) -> tuple[fast.Found, np.ndarray]:
    """What scores above a threshold, in each shard another, as a search would give it; and all scores."""
    found = found_for(len(sizes), group)
    scores = normal(seed, group, sum(sizes)) * 4
    first = 0
    for shard, size in enumerate(sizes):
        mine = scores[:, first : first + size]
        found.firsts[shard], found.sizes[shard] = first, size
        for i in range(group):
            floor = np.sort(mine[i])[-min(k, size)]
            best = np.flatnonzero(mine[i] >= floor)
            found.floors[shard, i], found.starts[shard, i + 1] = floor, found.starts[shard, i] + len(best)
            scored, ids = of_head(found, shard, i)
            scored[:], ids[:] = mine[i, best], best
        first += size
    found.shifts[:] = 0.5
    return found, scores + 0.5


def plain_weights(found: fast.Found, scores: np.ndarray, scale: float, outside: np.ndarray) -> np.ndarray:
    """What weigh() comes to, key by key."""
    group, n = scores.shape
    raised = np.zeros((group, n))
    top = scores.max(1) * scale
    for shard, (first, size) in enumerate(zip(found.firsts, found.sizes, strict=True)):
        for i in range(group):
            mine = np.exp(scores[i, first : first + size] * scale - top[i])
            rest = np.exp((found.floors[shard, i] + 0.5) * scale - top[i]) * REST
            raised[i, first : first + size] = rest
            best = of_head(found, shard, i)[1]
            raised[i, first + best] = mine[best]
    total = raised.sum(1) + np.exp(outside - top)
    return (raised / total[:, None]).sum(0)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.sampled_from([[128], [700], [512, 300], [1024, 1024, 65]]), st.integers(1, 5),
    st.integers(1, 200), st.integers(1, 600), st.sampled_from([1e-9, 1e-4, 1e-2]),
)  # fmt: skip
def test_the_numba_twin_chooses_what_the_plain_rule_chooses(seed, sizes, group, k, rows, tau):
    found, scores = candidates(seed, sizes, group, k)
    outside = normal(seed + 1, group)
    wanted = plain_weights(found, scores, 0.3, outside)
    n = sum(sizes)
    work = choice_scratch(max(sizes))
    shards = range(len(sizes))
    for shard in shards:
        fast.lift(found, shard, np.float32(0.3))
    fast.join(found, len(sizes), outside)
    weights = np.zeros(n, np.float32)
    for shard in shards:
        fast.weigh(found, shard, tau, work)
        first, count = found.firsts[shard], found.counts[shard]
        weights[first : first + found.sizes[shard]] = found.rest[shard]
        assert (np.diff(found.ids[shard, :count]) > 0).all()
        weights[first + found.ids[shard, :count]] = found.scores[shard, :count]
    np.testing.assert_allclose(weights, wanted, rtol=2e-3, atol=1e-6)
    raised = fast.raised_tau(found, len(sizes), rows, tau)
    assert raised == pytest.approx(sampling.raised_tau(weights, Limits(rows, tau)), rel=1e-3)
    chances = sampling.probabilities(weights, raised)
    drawn = [(fast.draw(found, shard, raised, np.uint64(seed), work), *map(np.copy, work[2:])) for shard in shards]
    ids = np.concatenate([ids[:count] for count, ids, _ in drawn])
    log_pi = np.concatenate([log_pi[:count] for count, _, log_pi in drawn])
    assert not work.extra.any()
    assert not work.marks.any()
    expected = sampling.draw(chances, seed)
    # Rounding of a weight by one unit may move a key over a tile's mark: rarely, and never far.
    same = np.intersect1d(ids, expected)
    assert len(same) >= 0.98 * len(expected) - 1
    assert abs(len(ids) - len(expected)) <= 2
    wanted_pi = np.log(chances[ids] / sampling.ONE)
    assert (np.abs(log_pi - wanted_pi) <= 2e-3 * np.maximum(1, np.abs(wanted_pi))).all()


def test_choosing_shard_by_shard_is_choosing():
    found, _ = candidates(3, [1024, 512], 3, 60)
    again = fast.Found(*map(np.copy, found))
    outside, work = normal(4, 3), choice_scratch(1024)
    rows, log_pi = fast.choose(found, 0.3, outside, Limits(100, 1e-3), np.uint64(9), work)
    assert 50 < len(rows) == len(log_pi) <= 110
    one, other = fast.choose(again, 0.3, outside, Limits(100, 1e-3), np.uint64(9), work)
    assert np.array_equal(rows, one)
    assert np.array_equal(log_pi, other)


def test_the_hash_is_that_of_the_plain_rule():
    for state, value in [(0, 0), (1, 2), (2**63, 2**62 + 5), (12345, 7)]:
        assert int(fast.mixed(np.uint64(state), value)) == sampling.mixed(state, value)


def stored(shard: Shard, dim: int) -> np.ndarray:
    """What Faiss scans."""
    return faiss.rev_swig_ptr(shard._list.get_codes(0), packed_bytes(shard._index.ntotal, dim))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_packed_codes_are_what_faiss_itself_would_store(dim):
    places = normal(dim, 3 * BLOCK, dim)
    shard, by_faiss = (Shard(np.zeros(dim, np.float32), np.ones(dim, np.float32)) for _ in range(2))
    shard.append(places[:BLOCK])
    shard.append(places[BLOCK:])
    by_faiss._index.add(np.concatenate((places, np.ones((3 * BLOCK, 1), np.float32)), axis=1))
    assert np.array_equal(stored(shard, dim), stored(by_faiss, dim))
    queries = normal(1, 3, dim + 1)
    one, other = (s._index.range_search(queries, 1.0) for s in (shard, by_faiss))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("most", [1000, 40])
def test_a_search_without_python_finds_what_faiss_finds(most):
    dim, n = 64, 2048
    shard = Shard(np.zeros(dim, np.float32), np.ones(dim, np.float32))
    shard.append(normal(0, n, dim))
    queries = normal(1, 3, dim + 1)
    queries[:, dim] = [-8, -4, -20]
    limits, scores, ids = shard._index.range_search(queries, 0.0)
    mine, numbers, starts = np.zeros(3 * most, np.float32), np.zeros(3 * most, np.int32), np.zeros(4, np.int64)
    search_above(native(), shard.address, queries, most, mine, numbers, starts)
    sizes = np.diff(limits)
    assert sizes.max() > 300 > 40 > sizes.min()
    assert np.array_equal(np.diff(starts), np.minimum(sizes, most))
    for i in range(3):
        mine_of, of = slice(*starts[i : i + 2]), slice(*limits[i : i + 2])
        order = np.argsort(-scores[of], kind="stable")[:most]
        assert set(numbers[mine_of]) <= set(ids[of])
        np.testing.assert_array_equal(np.sort(mine[mine_of])[::-1], scores[of][order])


@pytest.mark.skipif(not CAN_SCAN, reason="the processor has no AVX-512 VNNI")
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), group=st.integers(1, 12), dim=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    blocks=st.integers(1, 40), most=st.integers(1, 400), reach=st.floats(-3, 4), size=st.sampled_from([1e-3, 1, 1e4]),
)  # fmt: skip
def test_the_loop_finds_what_sums_of_rounded_queries_say(seed, group, dim, blocks, most, reach, size):
    keys, work = BLOCK * blocks, scan_scratch(dim, SHARD_TOKENS)
    places, queries = normal(seed, keys, dim), normal(seed + 1, group, dim + 1) * np.float32(size)
    queries[:, dim] = -reach * np.linalg.norm(queries[:, :dim], axis=1)
    shard = Shard(np.zeros(dim, np.float32), np.ones(dim, np.float32))
    shard.append(places)
    scores, ids = np.zeros(group * most, np.float32), np.zeros(group * most, np.int32)
    starts = np.zeros(group + 1, np.int64)
    scan_above(shard.codes_address, keys, queries, most, work, scores, ids, starts)
    scaled = places * np.float64(np.float32(1 / STEP)) + 7.5  # rounded once, as the loop's fused product is
    codes = np.clip(np.rint(scaled.astype(np.float32)), 0, 15).astype(np.int64)
    assert starts[0] == 0
    for i in range(group):
        unit = np.float64(np.abs(queries[i, :dim]).max()) / 127
        rounded = np.rint(queries[i, :dim] / unit).astype(np.int64)
        assert np.abs(rounded).max() == 127
        sums = codes @ rounded
        plain = (sums - 7.5 * rounded.sum()) * unit * STEP + queries[i, dim]
        tolerance = 1e-5 * (np.abs(plain).max() + abs(float(queries[i, dim])) + 1e-20)
        mine, numbers = scores[starts[i] : starts[i + 1]], ids[starts[i] : starts[i + 1]]
        assert len(set(numbers)) == len(numbers) <= most
        np.testing.assert_allclose(mine, plain[numbers], atol=tolerance)
        left = np.setdiff1d(np.arange(keys), numbers)
        assert (plain[numbers] >= -tolerance).all()
        if len(numbers) < most:
            assert (plain[left] < tolerance).all()
        elif len(left):
            assert plain[left].max(initial=-np.inf) <= max(mine.min(initial=np.inf), 0) + tolerance


@pytest.mark.skipif(not CAN_SCAN, reason="the processor has no AVX-512 VNNI")
def test_the_loop_and_faiss_agree():
    """Faiss rounds its tables, the loop queries: both are near what unrounded queries give, the loop nearer."""
    keys, queries = drifting(0, SHARD_TOKENS, 128), normal(1, 4, 128)
    space = rotated(1, 128).one(0)
    errors = []
    for by_faiss in (True, False):
        found = searched(built(keys, space, by_faiss=by_faiss), queries, 1000)
        errors.append(0.0)
        for i in range(4):
            scores, ids = of_head(found, 0, i)
            errors[-1] += float(np.square(scores + found.shifts[i] - queries[i] @ keys[ids].T).mean())
        assert 2000 < found.starts[0, -1] < 8000
    assert errors[1] <= errors[0] * 1.02


def test_every_128th_key_is_kept_for_thresholds():
    places = normal(0, SHARD_TOKENS, 64)
    shard = Shard(np.ones(64, np.float32), np.full(64, 2, np.float32))
    for first, last in [(0, 1024), (1024, 1056), (1056, 1120), (1120, 4096), (4096, SHARD_TOKENS)]:
        shard.append(places[first:last])
        assert np.array_equal(shard.samples[:, : (last + 63) // SAMPLE].T, places[64:last:SAMPLE])


def test_coordinates_at_the_ends_and_beyond_are_held():
    dim, out = 64, np.zeros(packed_bytes(BLOCK, 64), np.uint8)
    none, one = np.zeros(dim, np.float32), np.ones(dim, np.float32)
    pack(np.full((BLOCK, dim), 1e9, np.float32), none, one, out)
    assert (out[: 16 * dim] == 0xFF).all()
    assert not out[16 * dim :].any()
    pack(np.full((BLOCK, dim), -1e9, np.float32), none, one, out)
    assert not out.any()


@pytest.mark.parametrize("size", [1, 33, SHARD_TOKENS + BLOCK])
def test_a_shard_takes_whole_blocks_up_to_its_size(size):
    shard = Shard(np.zeros(64, np.float32), np.ones(64, np.float32))
    with pytest.raises(ValueError, match="whole blocks"):
        shard.append(np.zeros((size, 64), np.float32))


def drifting(seed: int, n: int, dim: int) -> np.ndarray:
    """Keys whose mean and spread move as they come."""
    moved = np.linspace(0, 3, n)[:, None] * normal(seed + 7, dim)
    return (normal(seed, n, dim) * np.linspace(1, 2, n)[:, None] + moved).astype(np.float32)


WAYS = [
    pytest.param(True, id="faiss"),
    pytest.param(False, id="vnni", marks=pytest.mark.skipif(not CAN_SCAN, reason="the processor has no AVX-512 VNNI")),
]
by_both = pytest.mark.parametrize("by_faiss", WAYS)


def built(keys: np.ndarray, space: Space, *pieces: int, by_faiss: bool) -> HeadIndex:
    index = HeadIndex(space, by_faiss)
    for piece in pieces:
        index.append(keys[index.size : index.size + piece])
    index.append(keys[index.size :])
    return index


def searched(index: HeadIndex, queries: np.ndarray, k: int) -> fast.Found:
    found = found_for(len(index.shards), len(queries))
    index.find(queries, k, found)
    return found


@by_both
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("learned", [True, False])
def test_candidates_and_their_scores_are_close_to_brute_force(dim, learned, by_faiss):
    keys, queries = drifting(0, 20_480, dim), normal(1, 4, dim)
    space = (balanced_for(keys[:4096], normal(2, 300, dim)) if learned else rotated(1, dim)).one(0)
    found = searched(built(keys, space, by_faiss=by_faiss), queries, 2000)
    exact = queries @ keys.T
    best = np.argsort(-exact, axis=1)[:, :100]
    for i in range(4):
        parts = [of_head(found, s, i) for s in range(len(found.firsts))]
        ids = np.concatenate([first + part[1] for first, part in zip(found.firsts, parts, strict=True)])
        assert len(np.intersect1d(ids, best[i])) >= 97
        assert 1000 < len(ids) < 3200
        error = np.concatenate([part[0] for part in parts]) + found.shifts[i] - exact[i, ids]
        assert np.sqrt(np.square(error).mean()) < 0.2 * exact[i].std()


@by_both
def test_a_shard_with_too_many_candidates_gives_the_best(by_faiss):
    """Nearly all of the best keys lie in the second shard."""
    keys = normal(0, 4 * SHARD_TOKENS, 64)
    query = normal(1, 1, 64)
    keys[SHARD_TOKENS : 2 * SHARD_TOKENS] += query
    found = searched(built(keys, rotated(1, 64).one(0), by_faiss=by_faiss), query, 6000)
    scores, ids = of_head(found, 1, 0)
    assert len(ids) == len(set(ids)) == MOST
    assert found.floors[1, 0] == scores.min() > found.floors[0, 0]
    exact = np.argsort(-(keys[SHARD_TOKENS : 2 * SHARD_TOKENS] @ query[0]))[:1000]
    assert len(np.intersect1d(exact, ids)) > 990


@by_both
@settings(max_examples=12)
@given(seed=st.integers(0, 100), pieces=st.lists(st.integers(1, 60), max_size=6))
def test_an_index_is_the_same_whatever_pieces_it_came_in(seed, pieces, by_faiss):
    keys = drifting(seed, SHARD_TOKENS + 2048, 64)
    one = built(keys, rotated(1, 64).one(0), by_faiss=by_faiss)
    other = built(keys, rotated(1, 64).one(0), REFERENCE, *(piece * BLOCK for piece in pieces), by_faiss=by_faiss)
    queries = normal(seed, 3, 64)
    first, second = searched(one, queries, 300), searched(other, queries, 300)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


def test_the_first_keys_must_make_a_reference():
    with pytest.raises(ValueError, match="at first at least"):
        HeadIndex(rotated(1, 64).one(0)).append(normal(0, REFERENCE - BLOCK, 64))


@by_both
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_any_magnitude_is_searched(size, by_faiss):
    keys = normal(0, 4096, 64) * np.float32(size)
    found = searched(built(keys, rotated(1, 64).one(0), by_faiss=by_faiss), normal(1, 2, 64) * np.float32(size), 500)
    best = np.argsort(-(normal(1, 2, 64) @ keys.T), axis=1)[:, :20]
    for i in range(2):
        assert len(np.intersect1d(of_head(found, 0, i)[1], best[i])) >= 19


@by_both
def test_constant_keys_are_no_trouble(by_faiss):
    keys = np.full((2048, 64), 3.0, np.float32)
    queries = normal(1, 2, 64)
    found = searched(built(keys, rotated(1, 64).one(0), by_faiss=by_faiss), queries, 100)
    assert np.isfinite(found.floors).all()
    np.testing.assert_allclose(found.floors[0] + found.shifts, queries @ keys[0], rtol=1e-2, atol=1e-2)


def test_levels_are_sixteen_and_symmetric():
    assert len(LEVELS) == 16
    np.testing.assert_allclose(LEVELS, -LEVELS[::-1])
    np.testing.assert_allclose(np.diff(LEVELS), STEP, rtol=1e-6)
