# SPDX-License-Identifier: Apache-2.0
"""The attention layer on CUDA: FlashAttention over the pages, search on the CPU meanwhile, merge."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm._custom_ops import reshape_and_cache_flash
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from vllm_retrieval_attn.device.cuda_host import CudaHost, DevicePlan
from vllm_retrieval_attn.device.cuda_kernels import merge_in_place, mirror
from vllm_retrieval_attn.device.prefill_stream import stream_of
from vllm_retrieval_attn.device.sketch import Sketch, current_sketch
from vllm_retrieval_attn.device.sketch_probe import host_part
from vllm_retrieval_attn.store.layout import Layout

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker


def _decode(
    sketch: Sketch,
    layer: int,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    attend_paged: Callable[[bool], torch.Tensor | None],
) -> None:
    """A layer of a captured step: attention over the paged tokens on a branch of its own, beside the scoring of all
    codes, joined where its log-sum-exp is wanted.

    Args:
        inputs: query, key and value of the rows. attend_paged: attends into ``output`` on the current stream.
    """
    query, key, value = inputs
    main, branch = torch.cuda.current_stream(), sketch.branch
    branch.wait_stream(main)
    with torch.cuda.stream(branch):
        lse = attend_paged(True)
    sketch.kernels.before(layer, key, value, query)
    main.wait_stream(branch)
    assert lse is not None
    sketch.kernels.after(layer, query, output, lse)


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
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self._head_size, dim=-1)
        key_cache, value_cache = map(canonicalize_singleton_dim_strides, (key_cache, value_cache))
        if self._one is None:
            self._one = torch.ones((), device=kv_cache.device)  # K and V are not quantized
        reshape_and_cache_flash(key, value, key_cache, value_cache, metadata.slot_mapping, "auto", self._one, self._one)

        def attend_paged(with_lse: bool) -> torch.Tensor | None:
            """Attention over the paged tokens into ``output``; its log-sum-exp (heads, T)."""
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
                return_softmax_lse=with_lse,
                scheduler_metadata=metadata.schedule,
                num_splits=metadata.splits,
                fa_version=self._version,
            )
            return result[1] if with_lse else None

        sketch = current_sketch()
        if metadata.graph:
            if sketch is None:
                self._ask(worker, layer, (query, key, value), output, attend_paged)
            elif metadata.paged:
                sketch.write_after_last(layer, kv_cache, metadata.slot_mapping)
                attend_paged(False)
            else:
                _decode(sketch, layer, (query, key, value), output, attend_paged)
            return
        search = False
        if plan is not None and worker is not None:
            host = worker.cuda
            device_plan = host.plan(plan)
            self._mirror(host, worker.arena.layout, layer, kv_cache, metadata, device_plan)
            if worker.space is not None:
                worker.space.add(layer, key, query, plan)
            search = plan.searched
            for part in device_plan.encoded:
                assert sketch is not None
                sketch.encode(layer, part.space, key.index_select(0, part.tokens), part.targets)
        streaming = plan.prefill if plan is not None else []
        chosen = plan is not None and plan.sketch is not None and plan.sketch.attends
        lse = attend_paged(search or bool(streaming) or chosen)
        if lse is None:
            return
        assert worker is not None
        assert plan is not None
        if search:
            self._post(worker, layer, plan, query, lse)
        for number, item in enumerate(streaming):
            lse[:, item.first : item.last] = self.attend_streamed(worker, plan, number, query, output, lse)
        if chosen:
            self._attend_chosen(worker, layer, plan, (query, key, value), output, lse)
        if search:
            self._collect(worker, layer, plan, query, output, lse)

    @staticmethod
    def _ask(
        worker: "RetrievalWorker | None",
        layer: int,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        attend_paged: Callable[[bool], torch.Tensor | None],
    ) -> None:
        """A layer of a captured step that CPU workers answer. Arguments as :func:`_decode`'s."""
        if worker is None:  # vLLM captures once to see what graphs take, before there is a host side
            attend_paged(False)
            return
        lse = attend_paged(True)
        assert lse is not None
        worker.cuda.ask_kernels.layer(layer, inputs, output, lse)

    def _attend_chosen(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Rows whose host tokens the GPU chooses from, outside of a graph."""
        tokens, kernels = worker.cuda.plan(plan).sketch_tokens, worker.sketch.kernels
        query, key, value = (part.index_select(0, tokens) for part in inputs)
        out, paged_lse = output.index_select(0, tokens), lse.index_select(1, tokens)
        assert plan.sketch is not None
        probe = plan.sketch.probe
        paged = out[probe].float().cpu().numpy() if probe >= 0 else None
        kernels.before(layer, key, value, query)
        kernels.after(layer, query, out, paged_lse)
        output.index_copy_(0, tokens, out)
        if paged is not None:
            assert worker.sampler is not None
            found = host_part(kernels, plan.sketch.rows, probe)
            asked, of_pages = query[probe].float().cpu().numpy(), paged_lse[:, probe].cpu().numpy()
            worker.sampler.record_sketched(layer, asked, found, paged, of_pages)

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
                host.arena_address + layer * layout.layer_elements * layout.itemsize,
                layout.head_elements,
            )
            host.mirror_done.record()

    def _post(
        self, worker: "RetrievalWorker", layer: int, plan: "StepPlan", query: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Send queries and the paged part's LSE to host memory, and the message once they are there."""
        host, decoding = worker.cuda, len(plan.decode_tokens)
        if plan.attends_here:
            return
        tokens = host.plan(plan).decode_tokens
        worker.arena.queries[:decoding].copy_(query.index_select(0, tokens), non_blocking=True)
        worker.arena.outside[:decoding].copy_(lse.index_select(1, tokens).T, non_blocking=True)
        host.queries_out.record()
        host.queries_out.synchronize()
        worker.answers.post(layer, plan)

    def _collect(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Wait for the actors, merge on the GPU."""
        host, decoding = worker.cuda, len(plan.decode_tokens)
        found, found_lse = host.found[:decoding], host.found_lse[:decoding]
        if not worker.answers.collect(plan, found.numpy(), found_lse.numpy()):
            self._attend_here(worker, layer, plan, query, output, lse)
            return
        if worker.sampler is not None and worker.sampler.active:
            self._record(worker, layer, plan, output, lse)
        more = found.to(host.device, non_blocking=True)
        more_lse = found_lse.to(host.device, non_blocking=True)
        merge_in_place(output, lse, more, more_lse.T, host.plan(plan).decode_tokens)

    def _attend_here(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """What the workers should have done, over all host tokens of the rows: FlashAttention reads them over the link,
        where they lie."""
        host = worker.cuda
        tokens, hosts = host.plan(plan).decode_tokens, host.hosts(plan)
        keys, values = host.host_rows(layer)
        part, part_lse = flash_attn_varlen_func(
            q=query.index_select(0, tokens),
            k=keys,
            v=values,
            cu_seqlens_q=hosts.starts,
            max_seqlen_q=1,
            seqused_k=hosts.lens,
            max_seqlen_k=hosts.longest,
            softmax_scale=self._scale,
            causal=False,
            block_table=hosts.table,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        merge_in_place(output, lse, part, part_lse, tokens)

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

    def attend_streamed(
        self,
        worker: "RetrievalWorker",
        plan: "StepPlan",
        number: int,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> torch.Tensor:
        """Exact attention of the plan's prefill row ``number`` over its host tokens; returns its LSE."""
        item, stage = plan.prefill[number], worker.cuda.stage
        stream = stream_of(plan, stage)
        q = query[item.first : item.last]
        running = output[item.first : item.last].float()
        running_lse = lse[:, item.first : item.last].contiguous()
        for _ in range(stream.counts[number]):
            rows, used, tokens = stream.take()
            part, part_lse = flash_attn_varlen_func(
                q=q,
                k=rows[..., 0, :].transpose(1, 2),
                v=rows[..., 1, :].transpose(1, 2),
                cu_seqlens_q=stream.starts[number],
                max_seqlen_q=item.last - item.first,
                seqused_k=used,
                max_seqlen_k=tokens,
                softmax_scale=self._scale,
                causal=False,
                block_table=stage.table,
                return_softmax_lse=True,
                fa_version=self._version,
            )
            stream.done()
            merge_in_place(running, running_lse, part, part_lse)
        output[item.first : item.last] = running.to(output.dtype)
        return running_lse
