# SPDX-License-Identifier: Apache-2.0
"""The NumPy twin of the decode kernels against sketch/, and the descriptor."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.device import decode_twin as twin
from vllm_retrieval_attn.device.decode_step import (
    FIELDS,
    HEADER,
    MOST_LAYERS,
    PAGE,
    RUN,
    Geometry,
    StepRow,
    describe,
    descriptor_of,
    items_of,
    most_entries,
)
from vllm_retrieval_attn.sketch import codes, sampling
from vllm_retrieval_attn.sketch.space import balanced_for, rotated


def geometry(**changes):
    sizes = {
        "layers": 2, "kv_heads": 3, "group": 4, "dim": 64, "dtype": "bfloat16", "rows": 4, "entries": 8,
        "host_pages": 8, "sketch_pages": 8, "scale": 0.125,
    }  # fmt: skip
    return Geometry(**(sizes | changes))


def row(tokens, pages, write=-1):
    return StepRow(tokens, write, 5000, 512, 1e-3, -7, 1, range(pages), range(pages, 0, -1))


def keys_and_queries(rng, dim, tokens, group):
    mixing = rng.standard_normal((dim, dim)).astype(np.float32) / 8
    keys = rng.standard_normal((tokens, dim)).astype(np.float32) @ mixing + rng.standard_normal(dim).astype(np.float32)
    return keys, rng.standard_normal((group, dim)).astype(np.float32) * 3


def test_exp_is_close_and_never_grows():
    x = -np.linspace(0, 90, 200_001).astype(np.float32)
    found = twin.exp_fixed(x)
    inside = x > -86
    np.testing.assert_allclose(found[inside], np.exp(x[inside].astype(np.float64)), rtol=1e-5)
    assert found[0] == 1
    assert (found[~inside] <= 1e-37).all()
    assert (twin.exp_fixed(np.float32([-np.inf, -1e30])) == np.float32(2.0**-125)).all()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_scores_are_those_of_the_codes(dim):
    rng = np.random.default_rng(dim)
    keys, queries = keys_and_queries(rng, dim, 2 * PAGE, 5)
    space = balanced_for(keys, queries).one(0)
    padded = geometry(dim=dim).padded
    packed, steps = twin.encode_places(codes.coordinates(keys, space), padded)
    whole, whole_steps = codes.encode(keys, space)
    np.testing.assert_array_equal(steps, whole_steps)
    if padded == dim:
        np.testing.assert_array_equal(packed, whole)
    scale = dim**-0.5
    asked = twin.query_digits(queries, space, scale, padded)
    tokens = 2 * PAGE - 300
    scored = twin.score_pages(asked, packed.reshape(2, PAGE, -1), steps.reshape(2, PAGE), tokens)
    found = (scored.scores.astype(np.float32) + scored.tops[..., None]).transpose(2, 0, 1, 3).reshape(5, -1)
    want = codes.score(queries, whole, whole_steps, space, scale)
    np.testing.assert_allclose(found[:, :tokens], want[:, :tokens], atol=np.abs(want).max() * 2e-3)
    assert np.isneginf(scored.scores.transpose(2, 0, 1, 3).reshape(5, -1)[:, tokens:]).all()
    outside = np.float32([1, -np.inf, np.inf, 30, -2])
    shares = twin.whole_attention(scored.records, outside)
    weights = twin.weights_of(scored, shares)[:tokens]
    wanted = sampling.weights_of(want[:, :tokens], twin.no_keys(outside))
    np.testing.assert_allclose(weights.sum(), wanted.sum(), rtol=2e-3)
    np.testing.assert_allclose(weights, wanted, rtol=3e-2, atol=1e-7)


@settings(max_examples=60)  # where two bins tie, rounding decides
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6000), st.floats(0.1, 6), st.integers(1, 1500),
    st.sampled_from([1e-12, 1e-9, 1e-5, 1e-3, 0.05]),
)  # fmt: skip
def test_tau_from_integer_bins_is_that_of_the_weights(seed, keys, deviation, limit, tau):
    assume(keys > limit)
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.standard_normal(keys) * deviation).astype(np.float32)
    weights *= np.float32(4 * rng.random() / weights.sum())
    assume(limit < keys)  # else all are read, whatever tau is
    found = twin.raised_tau(twin.histogram(weights, tau), limit, tau)
    want = sampling.raised_tau(weights, sampling.Limits(limit, tau))
    assert found == pytest.approx(want, rel=1e-4)
    assert np.minimum(1, weights.astype(np.float64) / found).sum() <= limit * 1.001


def test_rows_are_those_of_the_sampling_rule():
    rng = np.random.default_rng(0)
    weights = np.exp(rng.standard_normal(5000) * 2).astype(np.float32)
    weights /= weights.sum()
    limits = sampling.Limits(200, 1e-3)
    tau = twin.raised_tau(twin.histogram(weights, limits.tau), limits.rows, limits.tau)
    rows, log_pi = twin.choose(weights, 5000, tau, 77)
    want, want_log_pi = sampling.choose(weights, limits, 77)
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(log_pi, want_log_pi, atol=1e-5)
    assert 150 < len(rows) < 250


def test_keys_that_are_the_mean_have_a_step():
    packed, steps = twin.encode_places(np.zeros((1, 80), np.float32), 128)
    assert steps[0] > 0
    assert (packed == 0x88).all()
    space = rotated(1, 80).one(0)
    assert np.isfinite(twin.query_digits(np.zeros((2, 80)), space, 1.0, 128).unit).all()


def test_descriptor_holds_rows_and_pages():
    sizes = geometry()
    rows = [row(1500, 2, write=2048 - 1), row(0, 0), row(3000, 4)]
    numbers = descriptor_of(rows, sizes)
    assert numbers[:HEADER].tolist() == [3, 8]
    table = numbers[HEADER : HEADER + 3 * FIELDS].reshape(3, FIELDS)
    assert table.tolist() == [
        [1500, 2047, 5000, 512, 10**9, -7, 1, 0],
        [0, -1, 5000, 512, 10**9, -7, 1, 4],
        [3000, -1, 5000, 512, 10**9, -7, 1, 4],
    ]
    pages = numbers[HEADER + 3 * FIELDS :][:16].reshape(8, 2)
    assert pages.tolist() == [[0, 2], [1, 1], [-1, -1], [-1, -1], [0, 4], [1, 3], [2, 2], [3, 1]]
    assert items_of(rows, 2, 1, sizes) == slice(12 + 4, 12 + 8)
    assert items_of(rows, 0, 2, sizes) == slice(8, 12)


@pytest.mark.parametrize(("pages", "rows"), [(1, 1), (7, 3), (9, 200), (160, 2), (5, 5)])
def test_entries_suffice_however_pages_belong_to_rows(pages, rows):
    random = np.random.default_rng(pages)
    for _ in range(50):
        used = min(rows, pages)
        cuts = np.sort(random.choice(pages - 1, used - 1, replace=False)) + 1 if used > 1 else np.empty(0, int)
        sizes = np.diff(np.concatenate(([0], cuts, [pages])))
        assert sum(-(-int(size) // RUN) * RUN for size in sizes) <= most_entries(pages, rows)


def test_descriptor_refuses_what_does_not_fit():
    out = np.zeros(geometry().descriptor_numbers, np.int64)
    with pytest.raises(ValueError, match="exceed"):
        describe([row(9000, 9)], geometry(), out)
    with pytest.raises(ValueError, match="exceed"):
        describe([row(1, 1)] * 5, geometry(), out)
    with pytest.raises(ValueError, match="tokens"):
        describe([row(1 << 21, 1)], geometry(), out)


@pytest.mark.parametrize("changes", [{"dim": 72}, {"group": 13}, {"dtype": "float32"}, {"layers": MOST_LAYERS + 1}])
def test_geometry_refuses_what_kernels_cannot_do(changes):
    with pytest.raises(ValueError, match=r"none of|not within|neither|more than"):
        geometry(**changes)
