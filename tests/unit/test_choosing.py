"""Choosing rows in Numba against its plain twin, and the Faiss shards against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_retrieval_attn.index.choosing as fast
from vllm_retrieval_attn.index.choosing import REST, choice_scratch
from vllm_retrieval_attn.index.head import REFERENCE, HeadIndex, best_of, found_for
from vllm_retrieval_attn.index.packing import STEP, pack
from vllm_retrieval_attn.index.shard import BLOCK, LEVELS, SHARD_TOKENS, Shard
from vllm_retrieval_attn.sketch import sampling
from vllm_retrieval_attn.sketch.sampling import Limits
from vllm_retrieval_attn.sketch.space import Space, balanced_for, rotated


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def candidates(seed: int, sizes: list[int], group: int, k: int) -> tuple[fast.Found, np.ndarray]:
    """The best k of random scores (g, n) in each shard, as a search would give them."""
    found = found_for(len(sizes), group, k)
    scores = normal(seed, group, sum(sizes)) * 4
    first = 0
    for shard, size in enumerate(sizes):
        mine = scores[:, first : first + size]
        count = min(k, size)
        best = np.argsort(-mine, axis=1, kind="stable")[:, :count]
        found.counts[shard], found.firsts[shard], found.sizes[shard] = count, first, size
        scored, ids = best_of(found, shard, group)
        scored[:], ids[:] = np.take_along_axis(mine, best, 1), best
        found.shifts[shard] = 0.5
        first += size
    return found, scores + 0.5


def plain_weights(found: fast.Found, scores: np.ndarray, scale: float, outside: np.ndarray) -> np.ndarray:
    """What weigh() comes to, key by key."""
    group, n = scores.shape
    raised = np.zeros((group, n))
    top = scores.max(1) * scale
    for shard, (first, size, count) in enumerate(zip(found.firsts, found.sizes, found.counts, strict=True)):
        for i in range(group):
            mine = np.exp(scores[i, first : first + size] * scale - top[i])
            best = best_of(found, shard, group)[1][i]
            rest = mine[best[-1]] * REST if size > count else 0.0
            raised[i, first : first + size] = rest
            raised[i, first + best] = mine[best]
    total = raised.sum(1) + np.exp(outside - top)
    return (raised / total[:, None]).sum(0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.sampled_from([[128], [700], [512, 300], [1024, 1024, 65]]), st.integers(1, 5),
    st.integers(1, 200), st.integers(1, 600), st.sampled_from([1e-9, 1e-4, 1e-2]),
)  # fmt: skip
def test_the_numba_twin_chooses_what_the_plain_rule_chooses(seed, sizes, group, k, rows, tau):
    found, scores = candidates(seed, sizes, group, k)
    outside = normal(seed + 1, group)
    wanted = plain_weights(found, scores, 0.3, outside)
    n = sum(sizes)
    work = choice_scratch(n, len(sizes), k, rows + n)
    fast.weigh(found, len(sizes), np.float32(0.3), outside, work)
    weights = work.extra[:n].copy()
    for shard, (first, size) in enumerate(zip(found.firsts, found.sizes, strict=True)):
        weights[first : first + size] += work.rest[shard]
    np.testing.assert_allclose(weights, wanted, rtol=2e-3, atol=1e-6)
    raised = fast.raised_tau(found, len(sizes), rows, tau, work)
    assert raised == pytest.approx(sampling.raised_tau(weights, Limits(rows, tau)), rel=1e-3)
    chances = sampling.probabilities(weights, raised)
    count = fast.draw(found, len(sizes), raised, np.uint64(seed), work)
    assert not work.extra.any()
    expected = sampling.draw(chances, seed)
    # Rounding of a weight by one unit may move a key over a tile's mark: rarely, and never far.
    same = np.intersect1d(work.ids[:count], expected)
    assert len(same) >= 0.98 * len(expected) - 1
    assert abs(count - len(expected)) <= 2
    log_pi = np.log(chances[work.ids[:count]] / sampling.ONE)
    assert (np.abs(work.log_pi[:count] - log_pi) <= 2e-3 * np.maximum(1, np.abs(log_pi))).all()


def test_the_hash_is_that_of_the_plain_rule():
    for state, value in [(0, 0), (1, 2), (2**63, 2**62 + 5), (12345, 7)]:
        assert int(fast.mixed(np.uint64(state), value)) == sampling.mixed(state, value)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_packed_codes_are_what_faiss_itself_would_store(dim):
    places = normal(dim, 3 * BLOCK, dim)
    shard, by_faiss = (Shard(np.zeros(dim, np.float32), np.ones(dim, np.float32)) for _ in range(2))
    shard.append(places[:BLOCK])
    shard.append(places[BLOCK:])
    by_faiss._index.add(places)
    import faiss

    mine, theirs = (faiss.rev_swig_ptr(s._index.codes.get(), 3 * BLOCK * dim // 2) for s in (shard, by_faiss))
    assert np.array_equal(mine, theirs)
    found = [(np.empty((3, 10), np.float32), np.empty((3, 10), np.int64)) for _ in range(2)]
    for one, (scores, ids) in zip((shard, by_faiss), found, strict=True):
        one.search(normal(1, 3, dim), scores, ids)
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][0], found[1][0])


def test_coordinates_at_the_ends_and_beyond_are_held():
    dim, out = 64, np.zeros(BLOCK * 32, np.uint8)
    pack(np.full((BLOCK, dim), 1e9, np.float32), out)
    assert (out == 0xFF).all()
    pack(np.full((BLOCK, dim), -1e9, np.float32), out)
    assert (out == 0).all()


@pytest.mark.parametrize("size", [1, 33, SHARD_TOKENS + BLOCK])
def test_a_shard_takes_whole_blocks_up_to_its_size(size):
    shard = Shard(np.zeros(64, np.float32), np.ones(64, np.float32))
    with pytest.raises(ValueError, match="whole blocks"):
        shard.append(np.zeros((size, 64), np.float32))


def drifting(seed: int, n: int, dim: int) -> np.ndarray:
    """Keys whose mean and spread move as they come."""
    moved = np.linspace(0, 3, n)[:, None] * normal(seed + 7, dim)
    return (normal(seed, n, dim) * np.linspace(1, 2, n)[:, None] + moved).astype(np.float32)


def built(keys: np.ndarray, space: Space, *pieces: int) -> HeadIndex:
    index = HeadIndex(space)
    for piece in pieces:
        index.append(keys[index.size : index.size + piece])
    index.append(keys[index.size :])
    return index


def searched(index: HeadIndex, queries: np.ndarray, k: int) -> fast.Found:
    found = found_for(len(index.shards), len(queries), k + 1)
    turned, shift = index.turn(queries)
    for shard in range(len(index.shards)):
        index.search(shard, turned, shift, k, found)
    return found


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("learned", [True, False])
def test_candidates_and_their_scores_are_close_to_brute_force(dim, learned):
    keys, queries = drifting(0, 20_480, dim), normal(1, 4, dim)
    space = (balanced_for(keys[:4096], normal(2, 300, dim)) if learned else rotated(1, dim)).one(0)
    found = searched(built(keys, space), queries, 2000)
    exact = queries @ keys.T
    best = np.argsort(-exact, axis=1)[:, :100]
    for i in range(4):
        shards = range(len(found.counts))
        ids = np.concatenate([found.firsts[s] + best_of(found, s, 4)[1][i] for s in shards])
        assert len(np.intersect1d(ids, best[i])) >= 97
        scores = np.concatenate([best_of(found, s, 4)[0][i] + found.shifts[s, i] for s in shards])
        error = scores - exact[i, ids]
        assert np.sqrt(np.square(error).mean()) < 0.2 * exact[i].std()


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 100), st.lists(st.integers(1, 60), max_size=6))
def test_an_index_is_the_same_whatever_pieces_it_came_in(seed, pieces):
    keys = drifting(seed, SHARD_TOKENS + 2048, 64)
    one = built(keys, rotated(1, 64).one(0))
    other = built(keys, rotated(1, 64).one(0), REFERENCE, *(piece * BLOCK for piece in pieces))
    queries = normal(seed, 3, 64)
    first, second = searched(one, queries, 300), searched(other, queries, 300)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


def test_the_first_keys_must_make_a_reference():
    with pytest.raises(ValueError, match="at first at least"):
        HeadIndex(rotated(1, 64).one(0)).append(normal(0, REFERENCE - BLOCK, 64))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_any_magnitude_is_searched(size):
    keys = normal(0, 4096, 64) * np.float32(size)
    found = searched(built(keys, rotated(1, 64).one(0)), normal(1, 2, 64) * np.float32(size), 500)
    best = np.argsort(-(normal(1, 2, 64) @ keys.T), axis=1)[:, :20]
    for i in range(2):
        assert len(np.intersect1d(best_of(found, 0, 2)[1][i], best[i])) >= 19


def test_constant_keys_are_no_trouble():
    keys = np.full((2048, 64), 3.0, np.float32)
    found = searched(built(keys, rotated(1, 64).one(0)), normal(1, 2, 64), 100)
    assert np.isfinite(best_of(found, 0, 2)[0]).all()
    exact = normal(1, 2, 64) @ keys[0]
    np.testing.assert_allclose(best_of(found, 0, 2)[0][:, 0] + found.shifts[0], exact, rtol=1e-2, atol=1e-2)


def test_levels_are_sixteen_and_symmetric():
    assert len(LEVELS) == 16
    np.testing.assert_allclose(LEVELS, -LEVELS[::-1])
    np.testing.assert_allclose(np.diff(LEVELS), STEP, rtol=1e-6)
