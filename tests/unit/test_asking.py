# SPDX-License-Identifier: Apache-2.0
"""Steps in which a graph asks CPU workers, its kernels run by the CPU (tests/emulator); tests/gpu has them on a GPU."""

import pytest

from tests.asking_machine import CASES, AskingMachine
from tests.emulator.build import AVAILABLE, EmulatedAskKernels
from vllm_retrieval_attn.device.ask_kernels import Asked, describe, descriptor_numbers

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++")


@pytest.fixture
def machine():
    """Makes machines; all are closed at the end."""
    made = []

    def make(**sizes):
        made.append(AskingMachine(EmulatedAskKernels, "cpu", **sizes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("check", "sizes"), CASES)
def test_a_step_asks_and_does_without_an_answer(machine, check, sizes):
    check(machine(**sizes))


def test_more_rows_than_a_descriptor_holds_are_refused(machine):
    import numpy as np

    layout = machine().layout
    rows = np.zeros((layout.max_rows + 1, 3), np.int64)
    with pytest.raises(RuntimeError, match="a step with 7 rows and 0 tokens"):
        describe(Asked(rows, rows[:0, :2], 1, False, 1), layout, np.zeros(descriptor_numbers(layout), np.int64))
