# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decode step on a GPU, against their NumPy twin."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from tests.decode_machine import (
    LAYER,
    SHAPES,
    Machine,
    batch,
    check_codes,
    check_fetched,
    check_layer,
    check_layers_written,
    check_long_row,
    check_missing_pages,
)
from vllm_retrieval_attn.device.decode_kernels import DecodeKernels
from vllm_retrieval_attn.device.decode_step import descriptor_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@contextmanager
def machine_of(*shape, **sizes):
    machine = Machine(DecodeKernels, "cuda", *shape, **sizes)
    try:
        yield machine
    finally:
        machine.close()


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_equals_its_twin(dim, group, dtype):
    with machine_of(dim, group, dtype, seed=dim + group) as machine:
        check_layer(machine)


def test_a_long_row_equals_its_twin():
    with machine_of(64, 2, entries=304) as machine:
        check_long_row(machine)


def test_codes_of_many_tokens_are_those_of_the_twin():
    with machine_of(80, 2) as machine:
        check_codes(machine)


def test_layers_written_together_are_those_written_alone():
    with machine_of(128, 4) as machine:
        check_layers_written(machine)


def test_pages_are_fetched():
    with machine_of(128, 4) as machine:
        check_fetched(machine)


def test_managed_memory_is_seen_by_other_processes_and_stays_on_the_host():
    with machine_of(64, 1) as machine:
        script = """
import sys
import numpy as np
from vllm_retrieval_attn.index.elsewhere import check_readable, read_bytes, source_of
source = source_of(np.zeros(0, np.uint8), 1, int(sys.argv[1]), int(sys.argv[2]))
check_readable(source)
out = np.zeros(1000, np.uint8)
read_bytes(source, 12345, out)
sys.stdout.buffer.write(out.tobytes())
"""
        before = torch.cuda.mem_get_info()[0]
        pages = torch.arange(machine.geometry.host_pages, device="cuda")
        out = torch.empty(len(pages), 2, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
        for layer in range(2):
            machine.kernels.fetch(layer, pages, out)
        torch.cuda.synchronize()
        arguments = [sys.executable, "-c", script, str(os.getpid()), str(machine.memory.address)]
        read = subprocess.run(arguments, capture_output=True, check=True, timeout=300)
        assert read.stdout == machine.memory.array[2 * 12345 :][:1000].tobytes()
        assert before - torch.cuda.mem_get_info()[0] < machine.memory.array.nbytes


def test_pages_that_do_not_exist_are_skipped():
    with machine_of(128, 4) as machine:
        check_missing_pages(machine)


def test_replays_of_a_graph_follow_the_descriptor_and_repeat_bit_by_bit():
    with machine_of(128, 4) as machine:
        rows = batch(machine.geometry, machine.random)
        machine.fill_sketch(rows)
        inputs = machine.inputs()
        query, key, value, out, lse = inputs
        before = out.clone()
        machine.run(rows, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            machine.kernels.before(LAYER, key, value, query)
            machine.kernels.after(LAYER, query, out, lse)
        found = []
        for given in (rows, rows[:1], [], rows[:1], rows):
            out.copy_(before)
            machine.descriptor.copy_(torch.from_numpy(descriptor_of(given, machine.geometry)))
            graph.replay()
            found.append(out.clone())
        torch.cuda.synchronize()
        assert torch.equal(found[0], found[4])
        assert torch.equal(found[1], found[3])
        assert torch.equal(found[1][0], found[0][0])
        assert torch.equal(found[1][1:], before[1:])
        assert torch.equal(found[2], before)
