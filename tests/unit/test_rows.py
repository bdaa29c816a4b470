# SPDX-License-Identifier: Apache-2.0
"""The Numba kernels over rows against float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.layouts import DTYPES
from vllm_retrieval_attn.index.rows import (
    DTYPE_CODES,
    attend_exactly,
    attend_picked,
    attend_run,
    exp_in_place,
    finish,
    load,
    memory_of,
    running,
    scratch,
)

DIMS = [64, 80, 96, 128, 256]
EPS = 2.0**-24


class Softmax:
    """A running softmax over parts of some rows (n, 2, d). What no part may read is NaN."""

    AHEAD = 5

    def __init__(self, rows: torch.Tensor, q: np.ndarray) -> None:
        count, _, self.dim = rows.shape
        around = torch.full((self.AHEAD + count + self.AHEAD, 2, self.dim), torch.nan, dtype=rows.dtype)
        around[self.AHEAD : self.AHEAD + count] = rows
        code = DTYPE_CODES[str(rows.dtype).removeprefix("torch.")]
        self.memory, self.q = memory_of(around.view(torch.uint8).numpy(), code), q
        self.run, self.work = running(*q.shape), scratch(len(q))
        for part in (self.work.scores, self.work.log_pi, self.work.sum):
            part[:] = np.nan

    def fold(self, first: int, n: int) -> None:
        attend_run(self.memory, (self.AHEAD + first) * 2 * self.dim, n, self.q, self.run, self.work)

    def pick(self, numbers: np.ndarray, log_pi: np.ndarray) -> None:
        starts = (self.AHEAD + numbers) * 2 * self.dim
        attend_picked(self.memory, starts, log_pi, len(numbers), self.q, self.run, self.work)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        out, lse = np.full(self.q.shape, np.nan, np.float32), np.full(len(self.q), np.nan, np.float32)
        finish(self.run, out, lse)
        return out, lse


def reference(q: np.ndarray, rows: torch.Tensor, log_pi: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    keys, values = rows.double().numpy().swapaxes(0, 1)
    scores = q.astype(np.float64) @ keys.T - log_pi
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights @ values / total, (top + np.log(total))[:, 0]


def case(dtype: str, dim: int, count: int, group: int, spread: float = 1.0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(dim * 1000 + count)
    rows = torch.randn(count, 2, dim, generator=generator).to(DTYPES[dtype])
    return rows, (torch.randn(group, dim, generator=generator) * spread / dim**0.5).numpy()


def close(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(got[0], want[0], atol=3e-6, rtol=2e-5)
    np.testing.assert_allclose(got[1], want[1], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("count", "group"), [(1, 1), (2, 12), (63, 4), (64, 7), (65, 3), (333, 5)])
def test_a_run_of_rows_equals_the_float64_reference(dtype, dim, count, group):
    rows, q = case(dtype, dim, count, group)
    state = Softmax(rows, q)
    state.fold(0, count)
    close(state.result(), reference(q, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("count", "group"), [(1, 1), (11, 12), (64, 4), (130, 3)])
def test_picked_rows_equal_a_reference_whose_scores_get_minus_log_pi(dtype, dim, count, group):
    rows, q = case(dtype, dim, 200, group)
    random = np.random.default_rng(count)
    numbers, log_pi = random.permutation(200)[:count], np.log(random.uniform(1e-4, 1, count)).astype(np.float32)
    state = Softmax(rows, q)
    state.pick(numbers, log_pi)
    close(state.result(), reference(q, rows[torch.from_numpy(numbers)], log_pi))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_chance_one_half_counts_as_two(dtype):
    rows, q = case(dtype, 80, 70, 3)
    twice = Softmax(rows, q)
    twice.fold(0, 70)
    twice.fold(0, 70)
    state = Softmax(rows, q)
    state.pick(np.arange(70), np.full(70, np.log(0.5), np.float32))
    close(state.result(), twice.result())


PIECES = st.lists(st.tuples(st.booleans(), st.integers(0, 90)), min_size=1, max_size=6)


@given(st.sampled_from(list(DTYPES)), st.sampled_from(DIMS), st.integers(1, 12), PIECES, st.randoms())
def test_pieces_and_their_order_do_not_matter(dtype, dim, group, pieces, random):
    count = sum(size for _, size in pieces)
    rows, q = case(dtype, dim, count, group)
    ends = list(itertools.accumulate(size for _, size in pieces))
    parts = [(end - size, size, picked) for (picked, size), end in zip(pieces, ends, strict=True)]
    random.shuffle(parts)
    state = Softmax(rows, q)
    for first, size, picked in parts:
        if picked:
            state.pick(np.arange(first, first + size), np.zeros(size, np.float32))
        else:
            state.fold(first, size)
    out, lse = state.result()
    if count:
        close((out, lse), reference(q, rows))
    else:
        assert not out.any()
        assert np.isneginf(lse).all()


MAGNITUDES = st.floats(-3, 4).map(lambda exponent: 10**exponent)


@settings(max_examples=200)
@given(
    st.sampled_from(list(DTYPES)), st.sampled_from(DIMS), st.integers(1, 12), st.integers(1, 150),
    st.tuples(MAGNITUDES, MAGNITUDES, MAGNITUDES), st.floats(0, 20), st.integers(0, 2**31),
)  # fmt: skip
def test_all_magnitudes_give_what_float32_scores_allow(dtype, dim, group, count, magnitudes, rarest, seed):
    """With an error e of every score, weights are off by a factor of exp(2 e) at most, and the LSE by e."""
    keys, values, queries = magnitudes
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([keys, values])[:, None]
    rows = (torch.randn(count, 2, dim, generator=generator) * sizes).clamp(-6e4, 6e4).to(DTYPES[dtype])
    q = (torch.randn(group, dim, generator=generator) * queries).numpy()
    log_pi = (-rarest * torch.rand(count, generator=generator)).numpy()
    state = Softmax(rows, q)
    state.pick(np.arange(count), log_pi)
    out, lse = state.result()
    want, want_lse = reference(q, rows, log_pi)
    held = rows.double().numpy()
    error = (np.abs(q).astype(np.float64) @ np.abs(held[:, 0]).T).max(1) * EPS * dim + EPS * np.abs(want_lse) + 2e-6
    largest = np.abs(held[:, 1]).max()
    assert (np.abs(lse - want_lse) <= 2 * error).all()
    slack = np.minimum(np.expm1(np.minimum(4 * error, 50)), 2)[:, None] * largest + 4e-6 * largest
    assert (np.abs(out - want) <= slack).all()
    assert (out <= held[:, 1].max(0) + 4e-6 * largest).all()
    assert (out >= held[:, 1].min(0) - 4e-6 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sharp_softmax_holds(dtype):
    rows, q = case(dtype, 64, 500, 4, spread=40.0)
    state = Softmax(rows, q)
    state.fold(0, 500)
    (out, lse), (want, want_lse) = state.result(), reference(q, rows)
    np.testing.assert_allclose(out, want, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6)


@pytest.mark.parametrize("offset", [-512.0, 512.0])
def test_a_common_offset_of_scores_stays_out_of_the_weights(offset):
    rows, q = case("float32", 64, 130, 2)
    rows[:, 0, 0], q[:, 0] = 1.0, offset  # exp would underflow or overflow unless shifted
    state = Softmax(rows, q)
    state.fold(0, 130)
    np.testing.assert_allclose(state.result()[0], reference(q, rows)[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_rise_or_fall_from_tile_to_tile_are_weighed_alike(order):
    rows, q = case("float32", 64, 640, 3)
    rows[:, 0, 0], q[:, 0] = torch.linspace(-150, 150, 640), float(order)
    state = Softmax(rows, q)
    state.fold(0, 640)
    np.testing.assert_allclose(state.result()[0], reference(q, rows)[0], atol=2e-4, rtol=2e-4)


def test_no_rows_change_nothing():
    rows, q = case("float32", 64, 4, 2)
    state = Softmax(rows, q)
    state.fold(0, 0)
    state.pick(np.empty(0, np.int64), np.empty(0, np.float32))
    assert np.isneginf(state.run.top).all()
    assert not state.run.total.any()
    assert not state.run.acc.any()
    out, lse = state.result()
    assert (out == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_exact_attention_is_that_of_the_reference_with_its_scale(dtype):
    rows, q = case(dtype, 80, 200, 4, spread=5.0)
    held = rows.numpy()
    close(attend_exactly(held, q, 0.25), reference(q * np.float32(0.25), rows))
    close(attend_exactly(held[::3], q, 0.25), reference(q * np.float32(0.25), rows[::3]))
    out, lse = attend_exactly(held[:0], q, 0.25)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def exp(x: np.ndarray, n: int) -> None:
    exp_in_place(x, n)


def test_exp_is_accurate_to_four_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87, 0, 200_001), -np.geomspace(1e-8, 87, 50_000), [0.0]]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    exp(x, len(x))
    assert np.max(np.abs(x / want - 1)) < 4 * 2**-23


def test_exp_of_very_negative_scores_is_negligible_and_finite():
    x = np.array([-88, -200, -1e30, -np.inf], np.float32)
    exp(x, len(x))
    assert (x >= 0).all()
    assert (x < 1e-37).all()


def test_exp_leaves_the_rest_of_the_row():
    x = np.full(8, -1, np.float32)
    exp(x, 5)
    assert (x[5:] == -1).all()
    np.testing.assert_allclose(x[:5], np.exp(-1.0), rtol=4e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_bit_patterns_load_as_what_they_mean(dtype):
    """Subnormals, signed zeros, infinities and NaNs included."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    out = np.empty(len(patterns), np.float32)
    load(memory_of(patterns.numpy(), DTYPE_CODES[dtype]), 0, len(patterns), out)
    want = patterns.view(DTYPES[dtype]).float().numpy()
    assert np.isnan(want).sum() > 100
    assert np.isinf(want).sum() == 2
    np.testing.assert_array_equal(out, want)
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(out[finite]), np.signbit(want[finite]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "count"), [(0, 16), (3, 0), (1, 32), (5, 96), (64, 192)])
def test_elements_load_from_where_they_start(dtype, start, count):
    elements = torch.randn(264, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    out = np.full(count + 4, -1.0, np.float32)
    memory = memory_of(elements.view(torch.uint8).numpy(), DTYPE_CODES[dtype])
    load(memory, start, count, out)
    np.testing.assert_array_equal(out[:count], elements[start : start + count].float().numpy())
    assert (out[count:] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_seen_in_the_output(dtype, what):
    rows, q = case(dtype, 64, 70, 3)
    rows[17, 1, 5] = what
    state = Softmax(rows, q)
    state.fold(0, 70)
    out, lse = state.result()
    assert not np.isfinite(out[:, 5]).any()
    assert np.isfinite(np.delete(out, 5, axis=1)).all()
    np.testing.assert_allclose(lse, reference(q, rows)[1], rtol=1e-5)


def test_subnormal_float16_keys_and_values_are_read():
    generator = torch.Generator().manual_seed(1)
    parts = torch.randint(-1023, 1024, (70, 2, 64), generator=generator).short()
    rows = (parts.abs() | ((parts < 0).short() << 15)).view(torch.float16)
    assert rows.float().abs().max() < 2**-14
    q = (torch.randn(2, 64, generator=generator) * 2**14).numpy()
    state = Softmax(rows, q)
    state.fold(0, 70)
    (out, lse), (want, want_lse) = state.result(), reference(q, rows)
    np.testing.assert_allclose(out, want, atol=1e-9, rtol=2e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
