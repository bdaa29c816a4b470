# SPDX-License-Identifier: Apache-2.0
"""Coordinates of keys, their moments and their codes in compiled calls, against the same in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.index.coordinates import REFERENCE, Moments, coordinates
from vllm_retrieval_attn.index.packing import BLOCK, ORDER, STEP, pack, packed_bytes

DIMS = [16, 48, 64, 80, 128, 256]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), dim=st.sampled_from(DIMS), blocks=st.integers(1, 9))
def test_coordinates_are_a_product(seed, dim, blocks):
    keys, mean, matrix = normal(seed, blocks * BLOCK, dim), normal(seed + 1, dim), normal(seed + 2, dim, dim)
    found = np.zeros_like(keys)
    coordinates(keys, mean, matrix, found)
    wanted = (keys.astype(np.float64) - mean) @ matrix
    np.testing.assert_allclose(found, wanted, atol=1e-5 * dim)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), dim=st.sampled_from(DIMS), pieces=st.lists(st.integers(1, 40), min_size=1, max_size=5)
)
def test_moments_are_those_of_the_last_whole_reference(seed, dim, pieces):
    places = normal(seed, sum(pieces) * BLOCK, dim) * (1 + normal(seed + 1, dim) ** 2) + normal(seed + 2, dim)
    moments, done = Moments(dim), 0
    for piece in pieces:
        moments.add(places[done : done + piece * BLOCK])
        done += piece * BLOCK
    last = len(places) // REFERENCE * REFERENCE
    if not last:
        assert not moments.mean.any()
        assert (moments.deviation == 1).all()
        return
    wanted = places[last - REFERENCE : last].astype(np.float64)
    np.testing.assert_allclose(moments.mean, wanted.mean(0), atol=1e-4)
    np.testing.assert_allclose(moments.deviation, wanted.std(0), rtol=1e-4)


@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_levels_of_what_is_shifted_and_scaled(dim):
    places, mean, deviation = normal(0, 3 * BLOCK, dim) * 3, normal(1, dim), 0.5 + normal(2, dim) ** 2
    out = np.full(packed_bytes(3 * BLOCK, dim), 0xEE, np.uint8)
    pack(places, mean, deviation, out)
    exact = (places.astype(np.float64) - mean) / deviation / STEP + 7.5
    for number, block in enumerate(out.reshape(3, -1)):
        assert not block[16 * dim :].any()
        bytes_of = block[: 16 * dim].reshape(dim, 16)  # of each dimension, one for two keys
        for half, codes in enumerate((bytes_of & 15, bytes_of >> 4)):
            wanted = np.clip(exact[[number * BLOCK + key + 16 * half for key in ORDER]], 0, 15).T
            assert np.abs(codes - wanted).max() <= 0.5 + 1e-4
