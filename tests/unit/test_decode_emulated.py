# SPDX-License-Identifier: Apache-2.0
"""The sources of the decode kernels, run on the CPU by an emulator, against their NumPy twin."""

import pytest

from tests.decode_machine import (
    Machine,
    check_codes,
    check_fetched,
    check_host_part,
    check_layer,
    check_layers_written,
    check_long_row,
    check_missing_pages,
)
from tests.emulator.build import AVAILABLE, EmulatedKernels

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++")


def machine_of(*shape, **sizes):
    return Machine(EmulatedKernels, "cpu", *shape, **sizes)


@pytest.mark.parametrize(
    ("dim", "group", "dtype"), [(64, 5, "float16"), (80, 3, "bfloat16"), (128, 4, "bfloat16"), (256, 12, "bfloat16")]
)
def test_a_layer_equals_its_twin(dim, group, dtype):
    check_layer(machine_of(dim, group, dtype, seed=dim + group))


def test_threads_in_another_order_find_the_same(monkeypatch):
    monkeypatch.setenv("EMULATOR_REVERSED", "1")
    check_layer(machine_of(96, 9, seed=7))


def test_a_long_row_equals_its_twin():
    check_long_row(machine_of(64, 2, entries=304))


def test_codes_of_many_tokens_are_those_of_the_twin():
    check_codes(machine_of(80, 2))


def test_layers_written_together_are_those_written_alone():
    check_layers_written(machine_of(80, 3))


def test_pages_that_do_not_exist_are_skipped():
    check_missing_pages(machine_of(128, 4))


def test_a_row_read_back_is_attention_to_what_it_read():
    check_host_part(machine_of(80, 3))


def test_pages_are_fetched():
    check_fetched(machine_of(80, 3))
