# SPDX-License-Identifier: Apache-2.0
"""Vector code against NumPy."""

import numba
import numpy as np
import pytest
import torch

from tests.unit.layouts import DTYPES
from vllm_retrieval_attn.index import vector
from vllm_retrieval_attn.index.rows import DTYPE_CODES


@numba.njit
def _dots(row, dtype, queries, out):
    group, dim = queries.shape
    vector.dots(row, dtype, queries.ctypes.data, group, dim, out.ctypes.data, out.shape[1])


@numba.njit
def _add_values(base, dtype, starts, weights, sums):
    group, dim = sums.shape
    vector.add_values(
        base, dtype, starts.ctypes.data, len(starts), dim, weights.ctypes.data, weights.shape[1], group,
        sums.ctypes.data,
    )  # fmt: skip


@numba.njit
def _soften(scores, log_pi, count, top, total):
    vector.soften(scores.ctypes.data, log_pi.ctypes.data, count, top.ctypes.data, total.ctypes.data)


@numba.njit
def _widen(source, dtype, scale, out):
    vector.widen(source, dtype, len(out), scale, out.ctypes.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (4, 128), (5, 80), (3, 64), (12, 256), (7, 96)])
def test_scores_and_sums_are_those_of_numpy(dtype, group, dim):
    torch.manual_seed(dim + group)
    random = np.random.default_rng(group)
    rows = torch.randn(30, 2, dim).to(DTYPES[dtype])
    keys, values = rows.double().numpy().swapaxes(0, 1)
    code, size = DTYPE_CODES[dtype], rows.element_size()
    queries = random.standard_normal((group, dim)).astype(np.float32)
    flat = np.full((group, 3), np.nan, np.float32)
    _dots(rows.data_ptr() + 7 * 2 * dim * size, code, queries, flat)
    np.testing.assert_allclose(flat[:, 0], queries @ keys[7], rtol=1e-5, atol=1e-5)
    assert np.isnan(flat[:, 1:]).all()
    chosen = random.permutation(30)[:13]
    weights = random.random((group, 20), np.float32)
    sums = random.standard_normal((group, dim)).astype(np.float32)
    want = sums + weights[:, :13] @ values[chosen]
    _add_values(rows.data_ptr(), code, chosen.astype(np.int64) * 2 * dim, weights, sums)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    wide = np.zeros(dim, np.float32)
    _widen(rows.data_ptr(), code, np.float32(0.5), wide)
    np.testing.assert_array_equal(wide, (keys[0] * 0.5).astype(np.float32))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64])
@pytest.mark.parametrize("before", [-np.inf, -1.0, 50.0])
def test_scores_become_exponentials_relative_to_their_maximum(count, before):
    random = np.random.default_rng(count)
    scores = np.full(80, np.nan, np.float32)
    scores[:count] = random.standard_normal(count) * 20
    log_pi = np.full(80, np.nan, np.float32)
    log_pi[:count] = -random.random(count)
    lowered = scores[:count] - log_pi[:count]
    top, total = np.array([before], np.float32), np.full(1, np.nan, np.float32)
    _soften(scores, log_pi, count, top, total)
    assert top[0] == np.float32(max(before, lowered.max()))
    want = np.exp(np.maximum(lowered - top[0], -87).astype(np.float64))  # differences round in float32, too
    np.testing.assert_allclose(scores[:count], want, rtol=1e-6)
    np.testing.assert_allclose(total[0], want.sum(), rtol=1e-6)
    assert (scores[count : -(-count // 16) * 16] == 0).all()


def test_scores_of_nothing_weigh_next_to_nothing():
    scores, top, total = np.full(16, -np.inf, np.float32), np.array([-np.inf], np.float32), np.zeros(1, np.float32)
    _soften(scores, np.zeros(16, np.float32), 3, top, total)
    assert np.isneginf(top[0])
    assert 0 <= total[0] < 1e-36
