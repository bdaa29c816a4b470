# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM's graph manager (model runner V2): which steps are one graph, and which of two graphs they replay.

vLLM decides by shapes alone. With a sketch, a step that has work for the CPU workers may be no graph. One of which no
row attends to the host replays a graph without the kernels for that: on an H100 they took 0.37 ms of a step even where
they found nothing to do (docs/benchmarks.md, 2026-11-25). Remove when a connector or a backend can ask for a step's
kind of graph.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_retrieval_attn.plugin import compat
from vllm_retrieval_attn.plugin.resolved import find_resolved_config

_capturing_paged = False


@dataclass(frozen=True)
class PagedBatch(BatchExecutionDescriptor):
    """A batch of the same shape, no row of which attends to the host."""


def paged_twin(batch: BatchExecutionDescriptor) -> PagedBatch:
    """The same shape without rows on the host."""
    return PagedBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})


def capturing_paged() -> bool:
    """Whether the graph about to be captured is for batches of which no row attends to the host."""
    return _capturing_paged


def _with_twins(original: Any) -> Any:
    def _init_candidates(self: Any) -> None:
        from vllm.config import CUDAGraphMode

        original(self)
        config = find_resolved_config(self.vllm_config)
        descs = self._capture_descs.get(CUDAGraphMode.FULL)
        if config is not None and config.sketches and descs:
            self._capture_descs[CUDAGraphMode.FULL] = [x for desc in descs for x in (desc, paged_twin(desc))]

    return _init_candidates


def _telling_which(original: Any) -> Any:
    def capture(self: Any, create_forward_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def create(desc: Any, *more: Any, **named: Any) -> Any:
            global _capturing_paged
            _capturing_paged = isinstance(desc, PagedBatch)
            try:
                return create_forward_fn(desc, *more, **named)
            finally:
                _capturing_paged = False

        original(self, create, *args, **kwargs)

    return capture


def _looking_ahead(original: Any) -> Any:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_retrieval_attn.plugin.worker import current_worker

        if (worker := current_worker()) is not None:
            worker.look_ahead(scheduler_output)
        return original(self, scheduler_output, *args, **kwargs)

    return execute_model


def _dispatching(original: Any) -> Any:
    def dispatch(
        self: Any, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm_retrieval_attn.plugin.worker import current_worker

        worker = current_worker()
        if worker is None:
            return original(self, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
        if worker.needs_pieces:
            uniform_token_count = None  # as for a batch with a prefill
            kwargs["max_query_len"] = None
        found = original(self, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
        twin = paged_twin(found)
        worker.paged = not worker.attends and twin in self.graphs
        return twin if worker.paged else found

    return dispatch


def install() -> None:
    """Install the patches in this process. Safe to call again."""
    runner = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    compat.wrap(runner, "execute_model", _looking_ahead)
    compat.wrap(CudaGraphManager, "dispatch", _dispatching)
    compat.wrap(CudaGraphManager, "capture", _telling_which)
    compat.wrap(CudaGraphManager, "_init_candidates", _with_twins)
