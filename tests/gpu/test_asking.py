# SPDX-License-Identifier: Apache-2.0
"""Steps in which a graph asks CPU workers, on a GPU; tests/unit/test_asking.py runs the same on a CPU."""

import numpy as np
import pytest
import torch

from tests import asking_machine
from tests.asking_machine import AskingMachine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def machine():
    """Makes machines; all are closed at the end."""
    made = []

    def make(**sizes):
        made.append(AskingMachine(device="cuda", **sizes))
        return made[-1]

    yield make
    for one in made:
        one.close()


SHAPES = [(128, 4, "bfloat16", 2), (80, 3, "float16", 1), (256, 9, "bfloat16", 1)]


@pytest.mark.parametrize(("dim", "group", "dtype", "actors"), SHAPES)
def test_workers_answer_within_a_step(machine, dim, group, dtype, actors):
    asking_machine.check_answers(machine(dim=dim, group=group, dtype=dtype, actors=actors))


def test_a_step_finds_what_single_messages_find(machine):
    asking_machine.check_searched(machine(indexed=True, table_pages=40, threads=2, dim=128))


@pytest.mark.parametrize(("dim", "group", "dtype", "actors"), SHAPES)
def test_where_nobody_answers_host_tokens_are_attended_to(machine, dim, group, dtype, actors):
    asking_machine.check_nobody_there(machine(dim=dim, group=group, dtype=dtype, actors=actors, limit_s=0.2))


def test_waiting_ends_where_workers_are_given_up(machine):
    asking_machine.check_given_up(machine(limit_s=20.0))


def test_workers_are_not_asked_where_the_engine_knows_better(machine):
    asking_machine.check_not_asked(machine(limit_s=20.0))


def test_workers_may_be_lost_between_two_layers(machine):
    asking_machine.check_lost_between_layers(machine(limit_s=0.5))


def test_a_row_whose_search_fails_is_attended_to(machine):
    asking_machine.check_a_failed_row(machine(indexed=True, table_pages=20))


def test_a_step_may_ask_for_nothing(machine):
    asking_machine.check_nothing_to_ask(machine())


def test_a_graph_asks_anew_with_every_replay(machine):
    one = machine(dim=128, limit_s=5.0, table_pages=8)
    one.ring.start_all()
    lay = one.layout
    layers = [one.inputs(4) for _ in range(lay.layers)]
    pages = [out.clone() for _, out, _ in layers]
    one.asking.open(None)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):  # once before, as vLLM does
        for layer, (inputs, out, lse) in enumerate(layers):
            one.kernels.layer(layer, inputs, out, lse)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for layer, (inputs, out, lse) in enumerate(layers):
            out.copy_(pages[layer])
            one.kernels.layer(layer, inputs, out, lse)
    for seed, tokens in enumerate([[3, 0, 2], [1], [0, 1, 2, 3], []]):
        message, stored = one.fill([100 * (row + 1) + seed for row in range(len(tokens))], seed)
        plan = one.plan(message, tokens)
        plan.mirror_tokens = np.array([0])
        one.asking.open(plan)
        graph.replay()
        one.asking.sent()
        outcome = one.asking.close()
        torch.cuda.synchronize()
        one.check(layers, [(page, lse) for page, (_, _, lse) in zip(pages, layers, strict=True)], stored, tokens)
        assert outcome is None if not tokens else not outcome.late
