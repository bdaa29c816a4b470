# SPDX-License-Identifier: Apache-2.0
"""Every kind of index to compare with against brute force in float64, on clustered keys with queries from elsewhere."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vllm_retrieval_attn.baselines.candidates import SMALL, CandidateIndex
from vllm_retrieval_attn.baselines.registry import KINDS, make_index
from vllm_retrieval_attn.baselines.roar import TAIL_ROWS

G = 3
BASELINES = [kind for kind, cls in KINDS.items() if issubclass(cls, CandidateIndex)]


def sample(n, dim, seed=0, queries=256):
    """Keys and values (n, dim) around 24 centres, prompt queries (G, queries, dim) between pairs of centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(dim).standard_normal((24, dim))
    keys = centres[rng.integers(24, size=n)] + 1.3 * rng.standard_normal((n, dim))
    a, b = rng.integers(24, size=(2, G, queries))
    prompt = centres[a] + 0.5 * centres[b] + 0.7 * rng.standard_normal((G, queries, dim)) - 0.5
    return keys, rng.standard_normal((n, dim)), prompt.astype(np.float32)


def scores_of(index, queries):
    return queries.astype(float) @ index.rows[:, 0].astype(float).T * index.scale


def assert_attends(index, queries, result, rows=None):
    """``result`` is attention over ``rows`` (one array a query; None: all) and nothing else."""
    for q, (out, lse) in enumerate(zip(*result, strict=True)):
        chosen = np.arange(index.size) if rows is None else rows[q]
        weights = np.exp(scores_of(index, queries[q : q + 1])[0, chosen])
        np.testing.assert_allclose(lse, np.log(weights.sum()), atol=1e-4)
        np.testing.assert_allclose(out, weights @ index.rows[chosen, 1].astype(float) / weights.sum(), atol=1e-4)


def assert_exact(index, queries, k=10):
    found, rows = index.search(queries, k)
    expected = scores_of(index, queries)
    np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :k], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, rows, 1), found, atol=1e-4)
    assert_attends(index, queries, index.attend(queries))
    assert all((np.sort(r) == np.arange(index.size)).all() for r in index.attended(queries))


@pytest.fixture(scope="module")
def built():
    """One index of 3,000 float16 rows a kind, made once; and test queries (20, G, 64)."""
    keys, values, prompt = sample(3000, 64)
    indexes = {}
    for kind in KINDS:
        indexes[kind] = make_index(kind, 64**-0.5, 64)
        indexes[kind].build(keys, values, prompt)
    return indexes, sample(1, 64, seed=1, queries=20)[2].swapaxes(0, 1).copy()


def recall(index, queries, k, budget):
    hits = [
        np.isin(found, exact).mean()
        for q in queries
        for found, exact in zip(index.search(q, k, budget)[1], np.argsort(-scores_of(index, q))[:, :k], strict=True)
    ]
    return np.mean(hits)


@pytest.mark.parametrize(("dtype", "dim"), [(np.float32, 64), (np.float16, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_full_budget_is_brute_force(kind, dtype, dim):
    keys, values, prompt = sample(700, dim)
    index = make_index(kind, dim**-0.5, dim, dtype)
    index.build(keys[:500], values[:500], prompt)
    queries = sample(1, dim, seed=1, queries=1)[2][:, 0]
    assert_exact(index, queries)
    index.append(keys[500:], values[500:])
    assert index.size == 700
    assert_exact(index, queries)
    assert index.take_touched().keys == 2 * G * (500 + 700)
    assert index.touched.keys == 0


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_small_budget_after_append(kind, dtype):
    keys, values, prompt = sample(900, 80)
    index = make_index(kind, 80**-0.5, 80, dtype)
    index.build(keys[:800], values[:800], prompt)
    index.append(keys[800:], values[800:])
    strong = 3 * keys[-1:]  # a row appended wins, and must be found
    index.append(strong, values[:1])
    query = strong.astype(np.float32)
    assert index.search(query, 3, 0.3)[1][0, 0] == index.size - 1
    assert index.size - 1 in index.attended(query, 0.3)[0]
    assert_attends(index, query, index.attend(query, 0.3), index.attended(query, 0.3))


@pytest.mark.parametrize("kind", BASELINES)
def test_partial_search_returns_the_best_it_scored(built, kind):
    index, queries = built[0][kind], built[1]
    for q in queries[:5]:
        found, rows = index.search(q, 40, 0.1)
        attended = index.attended(q, 0.1)
        expected = scores_of(index, q)
        for i in range(G):
            valid = rows[i] >= 0
            assert (found[i][~valid] == -np.inf).all()
            assert len(set(rows[i][valid])) == valid.sum() > 0
            np.testing.assert_allclose(expected[i, rows[i][valid]], found[i][valid], atol=1e-4)
            assert (np.diff(found[i][valid]) <= 0).all()
            assert len(set(attended[i])) == len(attended[i])
            # What is attended was scored, so the best of it comes first.
            best = attended[i][np.argsort(-expected[i, attended[i]])]
            k = min(40, len(best))
            np.testing.assert_allclose(found[i][:k], expected[i, best[:k]], atol=1e-4)
        assert_attends(index, q, index.attend(q, 0.1), attended)


def test_ivf_attends_what_it_finds(built):
    index, queries = built[0]["ivf"], built[1]
    for q in queries:
        for rows, attended in zip(index.search(q, 10, 0.05)[1], index.attended(q, 0.05), strict=True):
            assert np.isin(rows, attended).all()


@pytest.mark.parametrize("kind", BASELINES)
def test_budget_bounds_what_is_touched(built, kind):
    index, queries = built[0][kind], built[1]
    row = index.dim * index.rows.itemsize
    for budget in (0.1, 0.3):
        index.take_touched()
        attended = sum(len(rows) for q in queries for rows in index.attended(q, budget))
        assert index.touched.keys == 0  # attended() does not count
        for q in queries:
            index.attend(q, budget)
        touched = index.take_touched()
        assert touched.queries == G * len(queries)
        assert 0.5 * budget < touched.keys / touched.queries / index.size < 1.5 * budget
        assert attended <= touched.keys
        structure = touched.bytes - (touched.keys + attended) * row
        assert 0 < structure < 4 * touched.keys * row
        for q in queries:
            index.search(q, 5, budget)
        assert index.take_touched().bytes == touched.bytes - attended * row


@pytest.mark.parametrize("kind", BASELINES)
def test_recall_grows_with_the_budget(built, kind):
    index, queries = built[0][kind], built[1]
    low, middle, high = (recall(index, queries, 20, budget) for budget in (0.03, 0.15, 0.6))
    assert low < middle <= high
    assert middle > 0.9
    assert high > 0.99
    assert recall(index, queries[:3], 20, 1.0) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_small(kind):
    index = make_index(kind, 0.125, 64)
    keys, values, prompt = sample(SMALL + 6, 64)
    queries = prompt[:, 0]
    assert index.index_bytes == 0
    assert (index.attend(queries, 0.1)[1] == -np.inf).all()
    scores, rows = index.search(queries, 2, 0.1)
    assert (rows == -1).all()
    assert (scores[rows < 0] == -np.inf).all() or kind == "flat"
    index.append(keys[:5], values[:5])
    assert_attends(index, queries, index.attend(queries, 0.1))
    assert (index.search(queries, 8, 0.1)[1] >= 0).sum() == G * 5
    index.append(keys[5:], values[5:])  # past SMALL, and never a prompt query
    assert_exact(index, queries)
    index.attend(queries, 0.5)
    index.build(keys[:3], values[:3], prompt[:, :0])
    assert index.size == 3
    assert_attends(index, queries, index.attend(queries, 0.1))


@pytest.mark.parametrize("kind", BASELINES)
def test_threads_search_as_one_does(built, kind):
    index, queries = built[0][kind], built[1]

    def both(q):
        return *index.search(q, 20, 0.1), *index.attend(q, 0.1)

    index.take_touched()
    serial = [both(q) for q in queries]
    alone = index.take_touched()
    with ThreadPoolExecutor(2) as pool:
        threaded = list(pool.map(both, queries))
    assert index.take_touched() == alone
    for one, other in zip(serial, threaded, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_roar_tail_is_scored_in_full_until_the_graph_is_made_anew():
    keys, values, prompt = sample(600 + TAIL_ROWS + 1, 64)
    index = make_index("roar", 0.125, 64)
    index.build(keys[:600], values[:600], prompt)
    index.append(keys[600:-1], values[600:-1])
    assert index.built == 600
    assert np.isin(np.arange(600, index.size), index.attended(prompt[:, 0], 0.1)[0]).all()
    index.append(keys[-1:], values[-1:])
    assert index.built == index.size
    assert len(index.attended(prompt[:, 0], 0.1)[0]) < TAIL_ROWS


def test_errors_name_what_is_wrong(built):
    with pytest.raises(ValueError, match="no index kind 'lsh': there are flat, ivf, hnsw, roar"):
        make_index("lsh", 1.0, 64)
    with pytest.raises(ValueError, match="budget must be above 0"):
        built[0]["ivf"].search(built[1][0], 1, 0.0)
