# SPDX-License-Identifier: Apache-2.0
"""What a long prompt launches for the first time, launched at start: the GPU loads kernels at their first use."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from vllm_retrieval_attn.device import cuda_kernels
from vllm_retrieval_attn.device.learning import SpaceLearner
from vllm_retrieval_attn.device.plan import HostRow
from vllm_retrieval_attn.store.requests import RequestStore

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.cuda import CudaLayer
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker


def warm_up(worker: "RetrievalWorker", layer: "CudaLayer", cache: torch.Tensor, tokens: int) -> None:
    """A chunk of ``tokens`` zeros takes a layer's way, into pages that nobody has yet.

    Args:
        worker: with its arena, of which no page is in use. cache: (blocks, kv_heads, block, 2 * d) of a layer.
    """
    host, lay, device = worker.cuda, worker.arena.layout, cache.device
    heads, kv_heads, dim = lay.heads, lay.kv_heads, lay.dim
    cuda_kernels.warm_up(cache, heads, host.arena_address, lay.head_elements)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    cuda_kernels.mirror(cache, one, one, one, host.arena_address, lay.head_elements)
    query = torch.zeros(tokens, heads, dim, dtype=cache.dtype, device=device)
    key = query[:, :kv_heads].contiguous()
    plan: Any = SimpleNamespace(prefill=[HostRow(0, 0, tokens, RequestStore("", 0, 0, 0, pages=[0]), 1)], stream=None)
    lse = torch.zeros(heads, tokens, dtype=torch.float32, device=device)
    layer.attend_streamed(worker, plan, 0, query, torch.zeros_like(query), lse)
    if worker.sketch is not None:
        nowhere = torch.full((tokens, 2), -1, dtype=torch.int64, device=device)
        worker.sketch.encode(0, 0, key.index_select(0, torch.arange(tokens, device=device)), nowhere)
    SpaceLearner(1).add(0, key, query)
    torch.cuda.synchronize(device)
