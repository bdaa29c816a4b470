"""The Numba kernels against float64."""

import numpy as np
import pytest
import torch

from vllm_retrieval_attn.index.kernels import DTYPE_CODES, attend_rows, exp_in_place, load_rows, scratch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def memory(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """uint16 and float32 views of one buffer with the bytes of ``rows``."""
    raw = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
    buffer = np.zeros(-(-raw.size // 64) * 64, np.uint8)
    buffer[: raw.size] = raw
    return buffer.view(np.uint16), buffer.view(np.float32)


class Running:
    """The running softmax of some queries over rows of keys, then as many values, in one buffer."""

    def __init__(self, dtype: str, keys: torch.Tensor, values: torch.Tensor, q: np.ndarray) -> None:
        self.count, self.dim = keys.shape
        self.mem16, self.mem32 = memory(torch.cat([keys, values]))
        self.code, self.q = DTYPE_CODES[dtype], q
        self.acc = np.zeros_like(q)
        self.top, self.total = np.full(len(q), -np.inf, np.float32), np.zeros(len(q), np.float32)
        self.scratch = scratch(*q.shape)

    def fold(self, first: int, n: int) -> None:
        attend_rows(
            self.mem16, self.mem32, self.code, first * self.dim, (self.count + first) * self.dim, n,
            self.q, self.acc, self.top, self.total, *self.scratch,
        )  # fmt: skip

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self.acc / self.total[:, None], self.top + np.log(self.total)


def reference(q: np.ndarray, keys: torch.Tensor, values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scores = q.astype(np.float64) @ keys.double().numpy().T
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights @ values.double().numpy() / total, (top + np.log(total))[:, 0]


def case(dtype: str, dim: int, count: int, group: int, spread: float = 1.0):
    generator = torch.Generator().manual_seed(dim * 1000 + count)
    keys, values = (torch.randn(count, dim, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    q = (torch.randn(group, dim, generator=generator) * spread / dim**0.5).numpy()
    return keys, values, q


def check(state: Running, keys: torch.Tensor, values: torch.Tensor, q: np.ndarray) -> None:
    want, want_lse = reference(q, keys, values)
    out, lse = state.result()
    np.testing.assert_allclose(out, want, atol=3e-6, rtol=2e-5)
    np.testing.assert_allclose(lse, want_lse, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("count", "group"), [(1, 1), (63, 4), (64, 7), (65, 3), (333, 5)])
def test_attend_rows_equals_float64_reference(dtype, dim, count, group):
    keys, values, q = case(dtype, dim, count, group)
    state = Running(dtype, keys, values, q)
    state.fold(0, count)
    check(state, keys, values, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [0, 1, 64, 77, 200, 201])
def test_attend_rows_in_two_calls_equals_one(dtype, cut):
    keys, values, q = case(dtype, 80, 201, 4)
    state = Running(dtype, keys, values, q)
    state.fold(0, cut)
    state.fold(cut, 201 - cut)
    check(state, keys, values, q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_rows_holds_with_sharp_softmax(dtype):
    keys, values, q = case(dtype, 64, 500, 4, spread=40.0)
    state = Running(dtype, keys, values, q)
    state.fold(0, 500)
    want, want_lse = reference(q, keys, values)
    out, lse = state.result()
    np.testing.assert_allclose(out, want, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6)


def test_attend_rows_keeps_a_common_score_offset_out_of_the_weights():
    keys, values, q = case("float32", 64, 130, 2)
    keys[:, 0], q[:, 0] = 1.0, -512.0  # every score is about -512: exp underflows unless shifted
    state = Running("float32", keys, values, q)
    state.fold(0, 130)
    out, _ = state.result()
    np.testing.assert_allclose(out, reference(q, keys, values)[0], atol=2e-4, rtol=2e-4)


def test_attend_rows_of_no_keys_changes_nothing():
    keys, values, q = case("float32", 64, 4, 2)
    state = Running("float32", keys, values, q)
    state.fold(0, 0)
    assert np.isneginf(state.top).all()
    assert not state.total.any()
    assert not state.acc.any()


def test_exp_in_place_is_accurate_to_four_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87, 0, 200_001), -np.geomspace(1e-8, 87, 50_000), [0.0]]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    bits = np.empty(len(x), np.int32)
    exp_in_place(x, len(x), bits, bits.view(np.float32))
    assert np.max(np.abs(x / want - 1)) < 4 * 2**-23


def test_exp_in_place_of_very_negative_scores_is_negligible_and_finite():
    x = np.array([-88, -200, -1e30, -np.inf], np.float32)
    bits = np.empty(len(x), np.int32)
    exp_in_place(x, len(x), bits, bits.view(np.float32))
    assert (x >= 0).all()
    assert (x < 1e-37).all()


def test_exp_in_place_leaves_the_rest_of_the_row():
    x = np.full(8, -1, np.float32)
    bits = np.empty(8, np.int32)
    exp_in_place(x, 5, bits, bits.view(np.float32))
    assert (x[5:] == -1).all()
    np.testing.assert_allclose(x[:5], np.exp(-1.0), rtol=4e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_rows_converts_every_finite_value_exactly(dtype):
    """All 65536 bit patterns, subnormals and signed zeros included."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
    finite = patterns[patterns.isfinite()]
    rows = finite[: len(finite) // 64 * 64].reshape(-1, 64)
    mem16, mem32 = memory(rows)
    out = np.empty(rows.shape, np.float32)
    load_rows(mem16, mem32, DTYPE_CODES[dtype], 0, len(rows), 64, out, out.view(np.uint32))
    assert np.array_equal(out, rows.float().numpy())


def test_attend_rows_reads_subnormal_float16_keys_and_values():
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randint(-1023, 1024, (70, 64), generator=generator).short() for _ in range(2))
    keys, values = ((rows.abs() | ((rows < 0).short() << 15)).view(torch.float16) for rows in (keys, values))
    assert keys.float().abs().max() < 2**-14
    q = (torch.randn(2, 64, generator=generator) * 2**14).numpy()
    state = Running("float16", keys, values, q)
    state.fold(0, 70)
    want, want_lse = reference(q, keys, values)
    out, lse = state.result()
    np.testing.assert_allclose(out, want, atol=1e-9, rtol=2e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
