# SPDX-License-Identifier: Apache-2.0
"""The plain reference: spaces, codes, and the rule that chooses rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_retrieval_attn.sketch import codes, sampling, space
from vllm_retrieval_attn.sketch.sampling import ONE, TILE, Limits

DIM = 64


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def balanced(keys: np.ndarray, queries: np.ndarray) -> space.Space:
    return space.balanced_for(keys, queries).one(0)


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_scores_survive_every_space(dim):
    stretch = np.geomspace(0.05, 20, dim).astype(np.float32)
    keys, queries = normal(0, 500, dim) * stretch + 3, normal(1, 40, dim) / stretch
    for one in (balanced(keys, queries), space.rotated(1, dim).one(0)):
        moved = codes.coordinates(keys, one) @ (queries @ one.queries.T).T + (queries @ one.mean)
        np.testing.assert_allclose(moved, keys @ queries.T, atol=2e-3 * np.abs(keys @ queries.T).max())


def test_keys_have_mean_zero_and_deviation_one_in_the_balanced_space():
    keys = normal(0, 4000, DIM) * np.geomspace(0.1, 10, DIM).astype(np.float32) + 5
    places = codes.coordinates(keys, balanced(keys, normal(1, 100, DIM)))
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(places.std(0), 1, atol=2e-2)


def test_the_balanced_space_codes_better_where_queries_and_keys_differ():
    stretch = np.geomspace(0.03, 30, DIM).astype(np.float32)
    keys, queries = normal(0, 3000, DIM) / stretch, normal(1, 200, DIM) * stretch
    truth = queries @ keys.T
    errors = []
    for one in (balanced(keys, queries), space.rotated(1, DIM).one(0)):
        errors.append(np.square(codes.score(queries, *codes.encode(keys, one), one, 1.0) - truth).mean())
    assert errors[0] < 0.2 * errors[1]


def test_a_key_is_coded_the_same_whoever_stands_beside_it():
    keys = normal(0, 300, DIM)
    one = balanced(keys, normal(1, 100, DIM))
    packed, steps = codes.encode(keys, one)
    alone = [codes.encode(key[None], one) for key in keys]
    assert np.mean([np.array_equal(packed[i], part[0][0]) for i, part in enumerate(alone)]) > 0.99  # BLAS rounds
    np.testing.assert_allclose(steps, [part[1][0] for part in alone], rtol=2e-3)


def test_codes_are_within_half_a_step_or_at_the_ends():
    one = space.rotated(1, DIM).one(0)
    keys = normal(0, 200, DIM)
    packed, steps = codes.encode(keys, one)
    levels = np.concatenate((packed & 15, packed >> 4), 1)
    error = np.abs((levels - 7.5) * steps[:, None].astype(np.float32) - codes.coordinates(keys, one))
    inside = (levels > 0) & (levels < 15)
    assert (error <= 0.5001 * steps[:, None].astype(np.float32))[inside].all()
    assert inside.mean() > 0.97


def test_statistics_that_are_not_finite_are_refused():
    keys = normal(0, 100, DIM)
    keys[3, 3] = np.inf
    with pytest.raises(ValueError, match="finite"), np.errstate(invalid="ignore"):
        space.balanced_for(keys, normal(1, 10, DIM))


def heavy(seed: int, n: int) -> np.ndarray:
    """(2, n) scores of two query heads, a few keys far above the others."""
    scores = normal(seed, 2, n)
    scores[:, np.random.default_rng(seed).integers(0, n, max(1, n // 50))] += 6
    return scores


@given(st.integers(0, 1000), st.integers(1, 900), st.integers(1, 300), st.sampled_from([1e-9, 1e-4, 1e-3, 1e-2, 0.2]))
def test_tau_keeps_the_rows_within_the_limit_and_wastes_little(seed, n, rows, tau):
    weights = sampling.weights_of(heavy(seed, n), np.full(2, -1.0, np.float32))
    raised = sampling.raised_tau(weights, Limits(rows, tau))
    assert raised >= tau
    expected = np.minimum(1, weights.astype(np.float64) / raised).sum()
    assert expected <= rows * (1 + 1e-6) + 1e-6
    if raised > tau * (1 + 1e-9) and rows < n:
        assert expected >= 0.8 * rows - 1


@given(st.integers(0, 1000), st.integers(1, 700), st.integers(0, 2**40))
def test_keys_from_tau_on_are_always_read_and_a_tile_reads_at_most_one_more(seed, n, draw):
    weights = sampling.weights_of(heavy(seed, n), np.zeros(2, np.float32))
    limits = Limits(max(1, n // 5), 1e-3)
    tau = sampling.raised_tau(weights, limits)
    rows, log_pi = sampling.choose(weights, limits, draw)
    assert (np.diff(rows) > 0).all()
    assert set(np.flatnonzero(weights >= np.float32(tau))) <= set(rows)
    assert (log_pi <= 1e-6).all()
    pi = sampling.probabilities(weights, tau) / ONE
    for first in range(0, n, TILE):
        taken = ((rows >= first) & (rows < first + TILE)).sum()
        assert (
            np.floor(pi[first : first + TILE].sum() - 1e-6) <= taken <= np.ceil(pi[first : first + TILE].sum() + 1e-6)
        )


def test_ids_are_a_function_of_weights_and_seed_and_seeds_differ():
    weights = sampling.weights_of(heavy(1, 2000), np.zeros(2, np.float32))
    limits = Limits(200, 1e-6)
    seeds = [sampling.seed_of(*key) for key in [(0, 5, 1, 2), (1, 5, 1, 2), (0, 6, 1, 2), (0, 5, 2, 2), (0, 5, 1, 3)]]
    assert len(set(seeds)) == 5
    draws = [tuple(sampling.choose(weights, limits, seed)[0]) for seed in seeds]
    assert len(set(draws)) == 5
    assert draws[0] == tuple(sampling.choose(weights.copy(), limits, seeds[0])[0])


def test_a_key_is_read_as_often_as_its_probability_says():
    weights = sampling.weights_of(heavy(3, 300), np.zeros(2, np.float32))
    limits = Limits(60, 1e-6)
    pi = sampling.probabilities(weights, sampling.raised_tau(weights, limits)) / ONE
    counts = np.zeros(300)
    for seed in range(4096):
        counts[sampling.choose(weights, limits, seed)[0]] += 1
    assert np.abs(counts / 4096 - pi).max() < 5 * np.sqrt(0.25 / 4096)
    assert abs(counts.sum() / 4096 - pi.sum()) < 0.3


class Converges:
    """Means over seeds of a row's merged numerator and denominator against exact attention."""

    def __init__(self, seeds: int = 4096) -> None:
        self.keys, self.values = normal(0, 700, DIM), normal(1, 700, DIM)
        self.queries, self.scale = normal(2, 3, DIM) * 1.5, DIM**-0.5
        self.outside = np.full(3, 2.0, np.float32)  # sinks and window, whose values are zero
        scores = self.queries @ self.keys.T * np.float32(self.scale)
        self.weights = sampling.weights_of(scores + normal(3, 3, 700) * 0.3, self.outside)
        self.total = np.exp(scores.astype(np.float64)).sum(1)
        self.sum = np.exp(scores.astype(np.float64)) @ self.values
        self.seeds = seeds

    def errors(self, drop_log_pi: bool) -> tuple[float, float]:
        """Relative error of the mean over seeds: of the host's share of the softmax's sum, and of the output."""
        totals, sums = np.zeros(3), np.zeros((3, DIM))
        for seed in range(self.seeds):
            rows, log_pi = sampling.choose(self.weights, Limits(40, 1e-6), sampling.seed_of(seed, 9, 0, 0))
            kept = np.zeros_like(log_pi) if drop_log_pi else log_pi
            out, lse = sampling.attend(self.keys, self.values, self.queries, self.scale, rows, kept)
            mass = np.exp(lse.astype(np.float64))
            totals += mass
            sums += mass[:, None] * out
        outside = np.exp(self.outside.astype(np.float64))
        lse_error = np.abs(np.log(totals / self.seeds + outside) - np.log(self.total + outside)).max()
        merged, exact = sums / (totals + self.seeds * outside)[:, None], self.sum / (self.total + outside)[:, None]
        return lse_error, float((np.linalg.norm(merged - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())


def test_over_seeds_output_and_log_sum_exp_converge_to_exact_attention():
    lse_error, output_error = Converges().errors(drop_log_pi=False)
    assert lse_error < 0.01
    assert output_error < 0.05


def test_without_log_pi_they_do_not():
    lse_error, output_error = Converges(seeds=256).errors(drop_log_pi=True)
    assert lse_error > 0.1
    assert output_error > 0.2


@given(st.integers(0, 100), st.sampled_from([1e-3, 1.0, 32.0, 1e4]))
def test_weights_are_finite_shares_at_any_magnitude(seed, size):
    weights = sampling.weights_of(normal(seed, 2, 50) * np.float32(size), np.array([-np.inf, 3.0], np.float32))
    assert np.isfinite(weights).all()
    assert 0 <= weights.sum() <= 2 + 1e-5
