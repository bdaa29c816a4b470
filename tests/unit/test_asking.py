# SPDX-License-Identifier: Apache-2.0
"""Steps in which a graph asks CPU workers, its kernels run by the CPU (tests/emulator); tests/gpu has them on a GPU."""

import pytest

from tests import asking_machine
from tests.emulator.build import AVAILABLE, EmulatedAskKernels
from vllm_retrieval_attn.device.ask_kernels import Asked, describe, descriptor_numbers

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++")


@pytest.fixture
def machine():
    """Makes machines; all are closed at the end."""
    made = []

    def make(**sizes):
        made.append(asking_machine.AskingMachine(EmulatedAskKernels, "cpu", **sizes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("dim", "group", "dtype", "actors"), [(64, 4, "bfloat16", 2), (80, 3, "float16", 1), (256, 9, "bfloat16", 1)]
)
def test_workers_answer_within_a_step(machine, dim, group, dtype, actors):
    asking_machine.check_answers(machine(dim=dim, group=group, dtype=dtype, actors=actors))


def test_a_step_finds_what_single_messages_find(machine):
    asking_machine.check_searched(machine(indexed=True, table_pages=40, threads=2))


@pytest.mark.parametrize(("dim", "group", "dtype"), [(64, 4, "bfloat16"), (80, 3, "float16"), (256, 9, "bfloat16")])
def test_where_nobody_answers_host_tokens_are_attended_to(machine, dim, group, dtype):
    asking_machine.check_nobody_there(machine(dim=dim, group=group, dtype=dtype, limit_s=0.2))


def test_waiting_ends_where_workers_are_given_up(machine):
    asking_machine.check_given_up(machine(limit_s=600.0))


def test_workers_are_not_asked_where_the_engine_knows_better(machine):
    asking_machine.check_not_asked(machine(limit_s=600.0))


def test_workers_may_be_lost_between_two_layers(machine):
    asking_machine.check_lost_between_layers(machine(limit_s=0.5))


def test_a_row_whose_search_fails_is_attended_to(machine):
    asking_machine.check_a_failed_row(machine(indexed=True, table_pages=20))


def test_a_step_may_ask_for_nothing(machine):
    asking_machine.check_nothing_to_ask(machine())


def test_more_rows_than_a_descriptor_holds_are_refused(machine):
    import numpy as np

    layout = machine().layout
    rows = np.zeros((layout.max_rows + 1, 3), np.int64)
    with pytest.raises(RuntimeError, match="a step with 7 rows and 0 tokens"):
        describe(Asked(rows, rows[:0, :2], 1, False, 1), layout, np.zeros(descriptor_numbers(layout), np.int64))
