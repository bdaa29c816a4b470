"""The default index: codes, clusters, search and calibration against brute force, on made and on real vectors."""

from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.bench.capture_file import load
from vllm_retrieval_attn.index import dot
from vllm_retrieval_attn.index.attention import ClusteredIndex
from vllm_retrieval_attn.index.build import build_segment, cluster, make_spaces, order_points, pack_blocks, pack_rows
from vllm_retrieval_attn.index.calibrate import SHARES, calibrated_share
from vllm_retrieval_attn.index.segment import HEAD_SHARE, LEAF, LEAVES, NODE, SegmentShape
from vllm_retrieval_attn.index.spaces import query_transform

REAL = Path(__file__).parent.parent / "data/smollm2.npz"
DIMS = [64, 80, 96, 128, 256]


@numba.njit
def block_sums(codes, query, blocks, vectors, plain, out):
    for block in range(blocks):
        source = codes.ctypes.data + block * 64 * vectors
        if plain:
            dot.dot_block_plain(source, query.ctypes.data, vectors, out.ctypes.data + 64 * block)
        else:
            dot.dot_block(source, query.ctypes.data, vectors, out.ctypes.data + 64 * block)


@numba.njit
def row_sums(codes, query, rows, width, size, plain, out):
    for row in range(rows):
        source = codes.ctypes.data + row * size
        if plain:
            out[row] = dot.dot_row_plain(source, query.ctypes.data, width, size)
        else:
            out[row] = dot.dot_row(source, query.ctypes.data, width, size)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_inner_products_of_codes_are_exact(dim, plain):
    rng = np.random.default_rng(dim)
    codes = rng.integers(0, 16, (64, dim))
    query = np.zeros(2 * dot.row_bytes(dim), np.int8)
    query[:dim] = rng.integers(-127, 128, dim)
    expected = codes @ query[:dim].astype(np.int64)
    out = np.zeros(64, np.int32)
    block_sums(pack_blocks(torch.from_numpy(codes)).numpy(), query, 4, dim // 8, plain, out)
    np.testing.assert_array_equal(out, expected)
    out[:] = 0
    row_sums(pack_rows(torch.from_numpy(codes)).numpy(), query, 64, dot.row_width(dim), dot.row_bytes(dim), plain, out)
    np.testing.assert_array_equal(out, expected)


def made(n, dim, heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, dim, generator=generator)
    pick = torch.randint(40, (heads, n), generator=generator)
    keys = centres[pick] + 0.7 * torch.randn(heads, n, dim, generator=generator)
    return keys, torch.randn(heads, n, dim, generator=generator)


def test_scores_survive_the_balanced_space():
    keys, _ = made(512, 64, heads=3)
    moment = torch.randn(3, 64, 64)
    spaces = make_spaces(keys, moment @ moment.mT)
    queries = torch.randn(3, 5, 64)
    got = (queries @ spaces.to_queries.mT) @ (keys @ spaces.to_keys.mT).mT
    torch.testing.assert_close(got, queries @ keys.mT, atol=2e-3, rtol=1e-3)


def test_the_balanced_space_spreads_keys_as_queries():
    keys, _ = made(512, 32, heads=2)
    keys = keys @ torch.diag(torch.logspace(-0.5, 0.5, 32))
    moment = torch.randn(2, 32, 32, dtype=torch.float64)
    moment = moment @ moment.mT
    to_queries = query_transform(keys, moment).double()
    to_keys = torch.linalg.inv(to_queries).mT
    centred = (keys - keys.mean(1, keepdim=True)).double()
    of_keys = to_keys @ (centred.mT @ centred / 512) @ to_keys.mT
    of_queries = to_queries @ moment @ to_queries.mT
    # M Sk M = Sq is what makes M a geometric mean; the ridges of both sides leave a small difference.
    difference = (of_keys - of_queries).flatten(1).norm(dim=1) / of_queries.flatten(1).norm(dim=1)
    assert (difference < 0.01).all()


def test_k_means_lowers_the_spread_and_labels_the_nearest():
    points, _ = made(1024, 16, heads=2)
    labels, centroids = cluster(points, 64)
    distances = torch.cdist(points, centroids)
    torch.testing.assert_close(distances.gather(2, labels[..., None])[..., 0], distances.amin(-1), atol=1e-4, rtol=1e-4)
    assert distances.amin(-1).square().mean() < 0.5 * points.var(1).sum(-1).mean()


def test_an_order_of_points_is_a_permutation_of_close_runs():
    points, _ = made(24 * 16, 8, heads=2)
    order = order_points(points, 16)
    assert (order.sort(1)[0] == torch.arange(24 * 16)).all()
    runs = points.gather(1, order[..., None].expand(-1, -1, 8)).view(2, 24, 16, 8)
    assert runs.var(2).mean() < 0.7 * points.var(1).mean()


@pytest.mark.parametrize("dim", DIMS)
def test_a_slab_describes_every_key_once_and_stays_small(dim):
    shape = SegmentShape(1024, dim)
    keys, values = made(1024, dim, heads=2)
    slabs = torch.zeros(2, shape.bytes, dtype=torch.uint8)
    build_segment(shape, keys, values, make_spaces(keys, torch.eye(dim).expand(2, dim, dim)), torch.zeros(2), slabs)
    at = shape.offsets
    order = slabs[:, at["order"] : at["order"] + 2048].contiguous().view(torch.uint16).int()
    assert (order.sort(1)[0] == torch.arange(1024)).all()
    ends = slabs[:, at["ends"] : at["ends"] + shape.leaves * 2].contiguous().view(torch.uint16).int()
    assert (ends.diff(dim=1) >= 0).all()
    assert (ends[:, -1] == 1024).all()
    if dim % 64 == 0:
        assert SegmentShape(8192, dim).bytes <= 0.15 * 8192 * dim * 4


@pytest.mark.parametrize("tokens", [0, 100, 1 << 16])
def test_impossible_segments_are_refused(tokens):
    with pytest.raises(ValueError, match="a multiple of 256"):
        SegmentShape(tokens, 64)


def exact(index, queries):
    keys, values = index.rows.astype(np.float64)
    scores = queries.astype(np.float64) @ keys.T * index.scale
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights @ values / total, (top + np.log(total))[:, 0], weights / total


@settings(max_examples=15, deadline=None)
@given(
    dim=st.sampled_from([64, 80, 128]),
    group=st.integers(1, 5),
    segments=st.integers(0, 3),
    rest=st.integers(0, 300),
    dtype=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 99),
)
def test_scanning_and_reranking_everything_is_exact_attention(dim, group, segments, rest, dtype, seed):
    n = segments * 256 + rest
    keys, values = made(max(n, 1), dim, seed=seed)
    queries = np.random.default_rng(seed).standard_normal((group, dim)).astype(np.float32)
    index = ClusteredIndex(dim**-0.5, dim, dtype, segment_tokens=256, rerank=10_000)
    index.build(keys[0, :n].numpy(), values[0, :n].numpy(), np.empty((group, 0, dim), np.float32))
    for budget in (0.999999, 1.0):
        out, lse = index.attend(queries, budget)
        if n == 0:
            assert (lse == -np.inf).all()
            continue
        want, want_lse, _ = exact(index, queries)
        np.testing.assert_allclose(out, want, atol=2e-4)
        np.testing.assert_allclose(lse, want_lse, atol=2e-4)


def test_appended_rows_are_found_before_and_after_they_fill_a_segment():
    keys, values = (part[0].numpy() for part in made(1500, 64))
    index = ClusteredIndex(0.125, 64, np.float32, segment_tokens=512, rerank=2000)
    index.build(keys[:600], values[:600], np.empty((2, 0, 64), np.float32))
    queries = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    for end in (700, 1024, 1500):
        index.append(keys[index.size : end], values[index.size : end])
        np.testing.assert_allclose(index.attend(queries, 0.999999)[0], exact(index, queries)[0], atol=2e-4)
    assert index.index_bytes >= 2 * index.shape.bytes


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
def test_a_budget_is_used_up_also_where_all_keys_weigh_the_same(spread):
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal(64) + spread * rng.standard_normal((4096, 64))).astype(np.float32)
    index = ClusteredIndex(0.125, 64, np.float32, segment_tokens=1024, rerank=200)
    index.build(keys, rng.standard_normal((4096, 64)), np.empty((2, 0, 64), np.float32))
    queries = rng.standard_normal((2, 64)).astype(np.float32) * 0.01
    assert 190 <= len(index.attended(queries, 0.2)[0]) <= 210
    index.take_touched()
    index.attend(queries, 0.2)
    assert 0.15 < index.take_touched().keys / 2 / 4096 < 0.3


@pytest.fixture(scope="module")
def real():
    """Real heads with an index over their prompt, and decode queries (t, g, d)."""
    built = []
    for head in load(REAL):
        index = ClusteredIndex(head.scale, head.K.shape[1], segment_tokens=1024)
        n = (head.bound - head.sink) // 1024 * 1024
        rows = slice(head.bound - n, head.bound)
        index.build(head.K[rows], head.V[rows], head.Qprompt.astype(np.float32))
        built.append((head.name, index, head.q.astype(np.float32).swapaxes(0, 1)[::6].copy()))
    return built


def quality(index, queries, budget):
    """Means over queries: recall@100, mass attended exactly, relative error of the output."""
    recall, mass, error = [], [], []
    for q in queries:
        want, _, weights = exact(index, q)
        out, _ = index.attend(q, budget)
        for head, rows in enumerate(index.attended(q, budget)):
            best = np.argsort(-weights[head])[:100]
            recall.append(np.isin(best, rows).mean())
            mass.append(weights[head, rows].sum())
        error.append(np.linalg.norm(out - want, axis=1) / np.linalg.norm(want, axis=1))
    return np.mean(recall), np.mean(mass), np.mean(error)


def test_quality_on_real_heads_grows_with_the_budget_and_the_tail_lowers_the_error(real):
    with_tail, without = [], []
    for name, index, queries in real:
        low, high = quality(index, queries, 0.1), quality(index, queries, 0.4)
        assert high[0] > max(low[0], 0.85), name
        assert high[2] < 0.12, (name, high)
        index.tail = False
        with_tail.append(low[2])
        without.append(quality(index, queries, 0.1)[2])
        index.tail = True
    assert np.mean(with_tail) < 0.85 * np.mean(without), (with_tail, without)


def test_the_calibrated_share_keeps_the_error_low(real):
    for name, index, queries in real:
        assert quality(index, queries, 0.0)[2] < 0.15, name


def test_touched_counts_what_was_read(real):
    _, index, queries = real[0]
    index.take_touched()
    index.attend(queries[0], 0.2)
    touched = index.take_touched()
    assert touched.queries == len(queries[0])
    share = touched.keys / len(queries[0]) / index.size
    assert 0.15 < share <= 0.21
    assert touched.bytes / len(queries[0]) < 0.8 * index.rows.nbytes


def test_calibration_scans_little_where_one_cluster_holds_the_mass_and_all_where_none_does():
    shape = SegmentShape(2048, 64)
    keys, values = made(2048, 64, heads=2)
    spaces = make_spaces(keys, torch.eye(64).expand(2, 64, 64))
    slabs = torch.zeros(2, shape.bytes, dtype=torch.uint8)
    build_segment(shape, keys, values, spaces, torch.zeros(2), slabs)
    queries = torch.stack((keys[0, :8] * 2.0, torch.randn(8, 64) * 0.01))
    lse = (queries @ keys.mT).logsumexp(-1)
    shares = calibrated_share(shape, slabs, keys, spaces, queries, lse)
    assert shares[0] < 0.5
    assert shares[1] == 1.0
    none = calibrated_share(shape, slabs, keys, spaces, queries, torch.full_like(lse, -torch.inf))
    assert (none == 1.0).all()
    assert set(shares.tolist()) <= {torch.tensor(share).item() for share in SHARES}


def test_a_node_is_a_whole_number_of_leaves():
    assert LEAF * LEAVES == NODE


def test_calibrating_anew_with_the_same_queries_changes_nothing_and_with_others_follows_them():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 512, 64).numpy()
    prompt = torch.randn(2, 48, 64).numpy()
    index = ClusteredIndex(0.125, 64, np.float32, segment_tokens=512)
    index.build(keys, values, prompt)
    before = index._slabs.copy()
    index.calibrate(prompt)
    np.testing.assert_array_equal(index._slabs, before)
    index.calibrate(np.repeat(keys[None, :24], 2, axis=0) * 8)  # each along one key: its leaf holds all the mass
    share = index._slabs[index._turn_bytes :][HEAD_SHARE * 8 : HEAD_SHARE * 8 + 8].view(np.float64)[0]
    built = before[index._turn_bytes :][HEAD_SHARE * 8 : HEAD_SHARE * 8 + 8].view(np.float64)[0]
    assert share < built
