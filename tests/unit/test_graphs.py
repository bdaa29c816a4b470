# SPDX-License-Identifier: Apache-2.0
"""Which graph a step replays: our patches over a manager of vLLM's."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_retrieval_attn.plugin import graphs, worker


@pytest.fixture
def manager(monkeypatch):
    """Graphs for one, two and four rows, of both kinds once captured."""
    for name in ("_init_candidates", "capture", "dispatch"):
        monkeypatch.setattr(CudaGraphManager, name, getattr(CudaGraphManager, name))
    monkeypatch.setattr(graphs, "find_resolved_config", lambda config: config)
    graphs.install()
    made = object.__new__(CudaGraphManager)
    cache = SimpleNamespace(use_kda_recoverssm=False)
    made.vllm_config = SimpleNamespace(sketches=True, speculative_config=None, cache_config=cache)
    made.compilation_config = SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4], max_cudagraph_capture_size=4)
    made.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    made.max_num_reqs, made.decode_query_len, made.varlen_decode, made.ubatch_runner = 4, 1, False, None
    made.lora_capture_cases, made._lora_dispatch_map = [0], {}
    made._candidates, made._capture_descs, made.graphs, made._graphs_captured = {}, {}, {}, True
    made._init_candidates()
    return made


def step(monkeypatch, **flags):
    made = SimpleNamespace(**{"needs_pieces": False, "attends": True, "paged": False, **flags})
    monkeypatch.setattr(worker, "current_worker", lambda: made)
    return made


def test_every_decode_graph_has_a_twin_for_rows_that_are_all_paged(manager):
    descs = manager._capture_descs[CUDAGraphMode.FULL]
    assert [type(desc) for desc in descs] == [BatchExecutionDescriptor, graphs.PagedBatch] * 3
    assert [desc.num_tokens for desc in descs] == [4, 4, 2, 2, 1, 1]
    assert len(dict.fromkeys(descs)) == 6  # as keys they differ
    assert not any(isinstance(desc, graphs.PagedBatch) for desc in manager._capture_descs[CUDAGraphMode.PIECEWISE])


def test_steps_take_the_graph_that_fits_them(manager, monkeypatch):
    manager.graphs = dict.fromkeys(manager._capture_descs[CUDAGraphMode.FULL])
    made = step(monkeypatch)
    found = manager.dispatch(3, 3, 1, 0)
    assert (type(found), found.num_tokens, found.cg_mode) == (BatchExecutionDescriptor, 4, CUDAGraphMode.FULL)
    assert not made.paged
    made = step(monkeypatch, attends=False)
    found = manager.dispatch(3, 3, 1, 0)
    assert (type(found), found.num_tokens, made.paged) == (graphs.PagedBatch, 4, True)
    found = manager.dispatch(1, 3, None, 0)  # a prefill
    assert (found.cg_mode, made.paged) == (CUDAGraphMode.PIECEWISE, False)
    made = step(monkeypatch, needs_pieces=True)
    assert manager.dispatch(3, 3, 1, 0).cg_mode is CUDAGraphMode.PIECEWISE
    made = step(monkeypatch, attends=False)
    manager.graphs = {}  # as while vLLM profiles
    assert type(manager.dispatch(3, 3, 1, 0)) is BatchExecutionDescriptor
    assert not made.paged


def test_what_is_captured_is_known_while_its_inputs_are_made():
    seen = []
    capture = graphs._telling_which(lambda self, create: [create(desc, warmup=True) for desc in self])
    one = BatchExecutionDescriptor(CUDAGraphMode.FULL, 1, 1)
    capture([one, graphs.paged_twin(one), one], lambda desc, warmup: seen.append(graphs.capturing_paged()))
    assert seen == [False, True, False]
    assert not graphs.capturing_paged()
