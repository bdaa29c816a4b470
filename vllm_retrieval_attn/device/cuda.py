"""The attention layer on CUDA: FlashAttention over the pages, search on the CPU meanwhile, merge."""

from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm._custom_ops import reshape_and_cache_flash
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from vllm_retrieval_attn.device.cuda_kernels import merge_in_place, mirror
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.pinning import Pinner

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import PrefillRow, StepPlan
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker
    from vllm_retrieval_attn.store.arena import Arena

_STAGE_BYTES = 64 << 20
"""Both buffers of the prefill stream together: enough to keep the link busy."""


@dataclass
class DevicePlan:
    """The index arrays of a StepPlan on the GPU."""

    mirror_tokens: torch.Tensor
    mirror_targets: torch.Tensor
    decode_tokens: torch.Tensor


class CudaHost:
    """What all layers of a rank share: streams, pinned buffers, staging for the prefill stream."""

    def __init__(self, arena: "Arena", device: torch.device) -> None:
        lay = arena.layout
        self._layout: Layout = lay
        self.arena_address = int(arena.views.pages.ctypes.data)
        self.pinner = Pinner(self.arena_address - lay.pages_offset, lay, device)
        arena.reserve = self.pinner.reserve
        self.device = device
        self.mirror_stream = torch.cuda.Stream(device)
        self.copy_stream = torch.cuda.Stream(device)
        self.mirror_done = torch.cuda.Event()
        self.written = torch.cuda.Event()
        self.queries_out = torch.cuda.Event()
        self.posted = 0
        shape = (lay.max_rows, lay.heads, lay.dim)
        self.found = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        self.found_lse = torch.empty(shape[:2], dtype=torch.float32, pin_memory=True)
        self.stage_pages = max(1, min(_STAGE_BYTES // 2 // lay.page_layer_bytes, lay.pages))
        stage = (2, self.stage_pages, lay.kv_heads, lay.page_tokens, 2, lay.dim)
        self.stage = torch.empty(stage, dtype=arena.pages.dtype, device=device)
        self.stage_table = torch.arange(self.stage_pages, dtype=torch.int32, device=device)[None]
        self.stage_full = [torch.cuda.Event() for _ in range(2)]
        self.stage_free = [torch.cuda.Event() for _ in range(2)]

    def plan(self, plan: "StepPlan") -> DevicePlan:
        """Send a step's index arrays to the GPU, once for all layers."""
        if plan.device is None:
            lay = self._layout
            targets = plan.mirror_pages * (lay.page_bytes // lay.itemsize) + plan.mirror_offsets * lay.row_elements

            def sent(array: Any) -> torch.Tensor:
                return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self.device, non_blocking=True)

            plan.device = DevicePlan(sent(plan.mirror_tokens), sent(targets), sent(plan.decode_tokens))
        return plan.device

    def fence_mirror(self) -> None:
        """Nothing later on the main stream may overwrite pages before their copy is done."""
        torch.cuda.current_stream().wait_event(self.mirror_done)

    def mirrored(self) -> Any:
        """An event that is reached once all copies to the arena issued so far are done."""
        event = torch.cuda.Event()
        event.record(self.mirror_stream)
        return event

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self.pinner.close()


class CudaLayer:
    """Attention of one retrieval layer on a CUDA device."""

    def __init__(self, scale: float, head_size: int) -> None:
        self._scale, self._head_size = scale, head_size
        self._one: torch.Tensor | None = None
        version = get_flash_attn_version(head_size=head_size)
        if version is None:
            raise ValueError("retrieval: FlashAttention is not available on this GPU; an Ampere or newer one is needed")
        self._version = version

    def forward(
        self,
        worker: "RetrievalWorker | None",
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: "RetrievalMetadata",
        plan: "StepPlan | None",
        output: torch.Tensor,
    ) -> None:
        """One batch. Arguments as in device/cpu.py.

        The mirror copies from the paged cache, not from ``key`` and ``value``: those live in memory that
        the next CUDA-graph piece may reuse, the cache is fenced at the end of the step.
        """
        begin = perf_counter_ns()
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self._head_size, dim=-1)
        key_cache, value_cache = map(canonicalize_singleton_dim_strides, (key_cache, value_cache))
        if self._one is None:
            self._one = torch.ones((), device=kv_cache.device)  # K and V are not quantized
        reshape_and_cache_flash(key, value, key_cache, value_cache, metadata.slot_mapping, "auto", self._one, self._one)
        search = False
        if plan is not None and worker is not None:
            host = worker.cuda
            device_plan = host.plan(plan)
            self._mirror(host, worker.arena.layout, layer, kv_cache, metadata, device_plan)
            worker.learn(layer, key, query, plan)
            search = plan.searched
        streaming = plan.prefill if plan is not None else []
        result = flash_attn_varlen_func(
            q=query,
            k=key_cache,
            v=value_cache,
            out=output,
            cu_seqlens_q=metadata.query_start_dev,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.resident_lens_dev,
            max_seqlen_k=metadata.max_resident_len,
            softmax_scale=self._scale,
            causal=True,
            block_table=metadata.resident_table,
            return_softmax_lse=search or bool(streaming),
            fa_version=self._version,
        )
        if not (search or streaming):
            return
        lse = result[1]
        assert worker is not None
        assert plan is not None
        if search:
            self._post(worker, layer, plan, query, lse)
        for item in streaming:
            lse[:, item.first : item.last] = self._stream(worker, layer, query, item, output, lse)
        if search:
            self._collect(worker, layer, plan, begin, output, lse)

    def _mirror(
        self,
        host: CudaHost,
        layout: Layout,
        layer: int,
        kv_cache: torch.Tensor,
        metadata: "RetrievalMetadata",
        device_plan: DevicePlan,
    ) -> None:
        if not len(device_plan.mirror_tokens):
            return
        host.written.record()
        with torch.cuda.stream(host.mirror_stream):
            host.mirror_stream.wait_event(host.written)
            mirror(
                kv_cache,
                metadata.slot_mapping,
                device_plan.mirror_tokens,
                device_plan.mirror_targets,
                host.arena_address,
                layer * (layout.page_layer_bytes // layout.itemsize),
                layout.head_elements,
            )
            host.mirror_done.record()

    def _post(
        self, worker: "RetrievalWorker", layer: int, plan: "StepPlan", query: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Send queries and the paged part's LSE to host memory, and the message once they are there."""
        host, decoding = worker.cuda, len(plan.decode_tokens)
        tokens = host.plan(plan).decode_tokens
        worker.arena.queries[:decoding].copy_(query.index_select(0, tokens), non_blocking=True)
        worker.arena.outside[:decoding].copy_(lse.index_select(1, tokens).T, non_blocking=True)
        host.queries_out.record()
        host.queries_out.synchronize()
        host.posted = perf_counter_ns()
        worker.client.post(layer, plan.decode_rows, plan.probe)

    def _collect(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        begin: int,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Wait for the actors, merge on the GPU."""
        host, decoding = worker.cuda, len(plan.decode_tokens)
        found, found_lse = host.found[:decoding], host.found_lse[:decoding]
        if not worker.collect(plan, found.numpy(), found_lse.numpy()):
            return
        answered = perf_counter_ns()
        if worker.sampler is not None and worker.sampler.active:
            self._record(worker, layer, plan, output, lse)
        more = found.to(host.device, non_blocking=True)
        more_lse = found_lse.to(host.device, non_blocking=True)
        merge_in_place(output, lse, more, more_lse.T, host.plan(plan).decode_tokens)
        stats = worker.client.search_stats()
        worker.timings.add_layer(begin, host.posted, host.posted, answered, perf_counter_ns(), stats)

    def _record(
        self, worker: "RetrievalWorker", layer: int, plan: "StepPlan", output: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Give the sampler a layer's partial results. Waits for the GPU, in the few steps that are sampled."""
        host, decoding = worker.cuda, len(plan.decode_tokens)
        assert worker.sampler is not None
        tokens = host.plan(plan).decode_tokens
        paged, paged_lse = output.index_select(0, tokens).float().cpu(), lse.index_select(1, tokens).T.float().cpu()
        worker.sampler.record(
            layer,
            worker.arena.queries,
            host.found[:decoding].numpy(),
            host.found_lse[:decoding].numpy(),
            paged.numpy(),
            paged_lse.numpy(),
        )

    def _stream(
        self,
        worker: "RetrievalWorker",
        layer: int,
        query: torch.Tensor,
        item: "PrefillRow",
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> torch.Tensor:
        """Exact attention of a prefill chunk over its host tokens, streamed through two buffers; returns its LSE."""
        host, arena = worker.cuda, worker.arena
        page_tokens = arena.layout.page_tokens
        q = query[item.first : item.last]
        length = item.last - item.first
        running = output[item.first : item.last].float()
        running_lse = lse[:, item.first : item.last].contiguous()
        starts = torch.tensor([0, length], dtype=torch.int32).pin_memory().to(host.device, non_blocking=True)
        main = torch.cuda.current_stream()
        ready = torch.cuda.Event()
        ready.record(main)
        host.copy_stream.wait_event(ready)
        pages = item.store.pages[: -(-item.host_tokens // page_tokens)]
        for number, first in enumerate(range(0, len(pages), host.stage_pages)):
            group = pages[first : first + host.stage_pages]
            tokens = min(item.host_tokens - first * page_tokens, len(group) * page_tokens)
            buffer = number % 2
            stage = host.stage[buffer]
            with torch.cuda.stream(host.copy_stream):
                if number >= 2:
                    host.copy_stream.wait_event(host.stage_free[buffer])
                for place, page in enumerate(group):
                    stage[place].copy_(arena.pages[page, layer], non_blocking=True)
                used = torch.tensor([tokens], dtype=torch.int32).pin_memory().to(host.device, non_blocking=True)
                host.stage_full[buffer].record()
            main.wait_event(host.stage_full[buffer])
            used.record_stream(main)
            part, part_lse = flash_attn_varlen_func(
                q=q,
                k=stage[..., 0, :].transpose(1, 2),
                v=stage[..., 1, :].transpose(1, 2),
                cu_seqlens_q=starts,
                max_seqlen_q=length,
                seqused_k=used,
                max_seqlen_k=tokens,
                softmax_scale=self._scale,
                causal=False,
                block_table=host.stage_table,
                return_softmax_lse=True,
                fa_version=self._version,
            )
            host.stage_free[buffer].record()
            merge_in_place(running, running_lse, part, part_lse)
        output[item.first : item.last] = running.to(output.dtype)
        return running_lse
