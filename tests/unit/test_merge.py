# SPDX-License-Identifier: Apache-2.0
"""Partial attention results merge to attention over the union of their keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.device.merge import merge_partials

HEADS, DIM = 3, 8


def attention(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, d) output and (heads,) log-sum-exp in float64; an empty set gives zeros and -inf."""
    scores, values = scores.double(), values.double()
    if scores.shape[1] == 0:
        return torch.zeros(HEADS, DIM, dtype=torch.float64), torch.full((HEADS,), -torch.inf, dtype=torch.float64)
    return torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = (part.float() for part in parts[0])
    for more, more_lse in parts[1:]:
        out, lse = merge_partials(out, lse, more.float(), more_lse.float())
    return out, lse


@st.composite
def partitions(draw):
    """Scores and values of some keys, and which of up to six sets each key is in (sets may be empty)."""
    keys = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(HEADS, keys, generator=generator) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    scores += draw(st.sampled_from([0.0, -1000.0, 1000.0, 5000.0]))
    values = torch.randn(keys, DIM, generator=generator)
    sets = draw(st.integers(1, 6))
    owner = torch.tensor(draw(st.lists(st.integers(0, sets - 1), min_size=keys, max_size=keys)))
    return scores, values, [owner == s for s in range(sets)]


def close(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], slack: float) -> None:
    torch.testing.assert_close(got[0].double(), want[0].double(), atol=slack, rtol=slack)
    torch.testing.assert_close(got[1].double(), want[1].double(), atol=1e-5, rtol=1e-6)


@settings(max_examples=200)
@given(partitions())
def test_merged_parts_equal_attention_over_the_union(case):
    scores, values, masks = case
    # float32 cannot hold log-sum-exps near 5000 better than 5e-4: the weights carry that error.
    slack = 1e-5 + 1e-6 * float(scores.abs().max())
    close(merged([attention(scores[:, m], values[m]) for m in masks]), attention(scores, values), slack)


@settings(max_examples=100)
@given(partitions(), st.randoms(use_true_random=False))
def test_order_of_parts_does_not_matter(case, random):
    scores, values, masks = case
    parts = [attention(scores[:, m], values[m]) for m in masks]
    shuffled = list(parts)
    random.shuffle(shuffled)
    close(merged(shuffled), merged(parts), 1e-5 + 1e-6 * float(scores.abs().max()))


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_set_changes_nothing(empty_first):
    scores, values = torch.randn(HEADS, 5), torch.randn(5, DIM)
    part, empty = attention(scores, values), attention(scores[:, :0], values[:0])
    out, lse = merged([empty, part] if empty_first else [part, empty])
    assert torch.equal(out, part[0].float())
    assert torch.equal(lse, part[1].float())


def test_two_empty_sets_give_zeros_and_minus_infinity():
    empty = attention(torch.empty(HEADS, 0), torch.empty(0, DIM))
    out, lse = merged([empty, empty])
    assert torch.equal(out, torch.zeros(HEADS, DIM))
    assert torch.isneginf(lse).all()


def test_a_far_smaller_part_vanishes_without_overflow():
    values = torch.randn(2, DIM)
    scores = torch.tensor([[3e4, -3e4]]).expand(HEADS, 2)
    out, lse = merged([attention(scores[:, i : i + 1], values[i : i + 1]) for i in range(2)])
    assert torch.equal(out, values[:1].expand(HEADS, DIM))
    assert torch.equal(lse, torch.full((HEADS,), 3e4))
