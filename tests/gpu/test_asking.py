# SPDX-License-Identifier: Apache-2.0
"""Steps in which a graph asks CPU workers, on a GPU; tests/unit/test_asking.py runs the same on a CPU."""

import numpy as np
import pytest
import torch

from tests.asking_machine import CASES, AskingMachine

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


@pytest.mark.parametrize(("check", "sizes"), CASES)
def test_a_step_asks_and_does_without_an_answer(machine, check, sizes):
    check(machine(**sizes))


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
