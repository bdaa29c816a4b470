"""The attention layer on CUDA: FlashAttention over the pages, search on the CPU meanwhile, merge."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm._custom_ops import reshape_and_cache_flash
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from vllm_retrieval_attn.device.cuda_kernels import merge_in_place, mirror
from vllm_retrieval_attn.device.prefill_stream import Stage, stream_of
from vllm_retrieval_attn.device.sketch import Sketch, current_sketch
from vllm_retrieval_attn.device.sketch_plan import SketchPlan
from vllm_retrieval_attn.device.sketch_probe import host_part
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.managed import ManagedMemory, can_share, let_workers_read
from vllm_retrieval_attn.store.pinning import Pinner

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker
    from vllm_retrieval_attn.store.arena import Arena


logger = logging.getLogger("vllm.retrieval")


@dataclass
class Encoded:
    """Tokens to code in one space: batch tokens (n,) int64, page and offset of the sketch (n, 2) int64."""

    space: int
    tokens: torch.Tensor
    targets: torch.Tensor


@dataclass
class HostTables:
    """What rows with one query attend to on the host: page table (rows, pages) int32, tokens (rows,) int32 and at most,
    and starts (rows + 1,) int32 of their queries."""

    table: torch.Tensor
    lens: torch.Tensor
    longest: int
    starts: torch.Tensor


@dataclass
class DevicePlan:
    """The index arrays of a StepPlan on the GPU."""

    mirror_tokens: torch.Tensor
    mirror_targets: torch.Tensor
    decode_tokens: torch.Tensor
    sketch_tokens: torch.Tensor
    encoded: list[Encoded]
    hosts: "HostTables | None" = None


def on_gpu(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same memory, pinned or managed and of elements of two bytes, as a tensor of the GPU."""
    strides = tuple(stride * host.element_size() for stride in host.stride())
    view = {"shape": tuple(host.shape), "strides": strides, "typestr": "<i2", "version": 3}
    place = {**view, "data": (host.data_ptr(), False)}
    pages: Any = type("Pages", (), {"__cuda_array_interface__": place})()
    return torch.as_tensor(pages, device=device).view(host.dtype)


def memory_for(layout: Layout, device: torch.device) -> ManagedMemory | None:
    """Memory for pages whose rows the GPU reads; None where it had better read them from the shared file."""
    if not can_share(device.index):
        logger.warning(
            "retrieval: this GPU does not read managed memory beside the CPU (WSL, a virtual GPU); the host arena is "
            "pinned shared memory, whose rows it reads at half the speed"
        )
        return None
    let_workers_read()
    return ManagedMemory(layout.all_pages_bytes, device.index)


class CudaHost:
    """What all layers of a rank share: streams, pinned buffers, staging for the prefill stream.

    Args:
        arena: of the rank. sketch: likewise. memory: the pages, if they do not lie in the shared file.
    """

    def __init__(
        self, arena: "Arena", device: torch.device, sketch: Sketch | None, memory: ManagedMemory | None
    ) -> None:
        lay = arena.layout
        self._layout: Layout = lay
        self._memory, self._pages = memory, arena.pages
        self._seen: torch.Tensor | None = None
        self.arena_address = int(arena.views.pages.ctypes.data)
        self.pinner = Pinner(int(arena.views.words.ctypes.data) - lay.parts["words"][0], lay)
        if sketch is not None:
            sketch.connect(self.arena_address)
            arena.codes = sketch.codes
        self.device = device
        self.mirror_stream = torch.cuda.Stream(device)
        self.mirror_done = torch.cuda.Event()
        self.written = torch.cuda.Event()
        self.queries_out = torch.cuda.Event()
        shape = (lay.max_rows, lay.heads, lay.dim)
        self.found = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        self.found_lse = torch.empty(shape[:2], dtype=torch.float32, pin_memory=True)
        fetching = sketch.kernels if sketch is not None and memory is not None else None
        self.stage = Stage(lay, arena.pages, device, fetching)

    def plan(self, plan: "StepPlan") -> DevicePlan:
        """Send a step's index arrays to the GPU, once for all layers."""
        if plan.device is None:
            lay = self._layout
            targets = plan.mirror_pages * lay.page_elements + plan.mirror_offsets * lay.row_elements

            def sent(array: Any) -> torch.Tensor:
                return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self.device, non_blocking=True)

            sketch = plan.sketch or SketchPlan()
            encoded = []
            for space in np.unique(sketch.encode_spaces).tolist():
                mine = sketch.encode_spaces == space
                where = np.stack((sketch.encode_pages[mine], sketch.encode_offsets[mine]), axis=1)
                encoded.append(Encoded(space, sent(sketch.encode_tokens[mine]), sent(where)))
            tokens = np.array(sketch.tokens, np.int64)
            plan.device = DevicePlan(
                sent(plan.mirror_tokens), sent(targets), sent(plan.decode_tokens), sent(tokens), encoded
            )
        return plan.device

    def hosts(self, plan: "StepPlan") -> HostTables:
        """Where the decode rows that the CPU workers should have served lie on the host; made once a step."""
        device_plan = self.plan(plan)
        if device_plan.hosts is None:
            rows = plan.decode_hosts
            tokens = [row.host_tokens for row in rows]
            counts = [self._layout.page_tokens_owned(count) for count in tokens]
            table = np.zeros((len(rows), max(counts)), np.int32)
            for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
                table[number, :count] = row.store.pages[:count]
            lens, starts = np.array(tokens, np.int32), np.arange(len(rows) + 1, dtype=np.int32)
            sent = (
                torch.from_numpy(part).pin_memory().to(self.device, non_blocking=True) for part in (table, lens, starts)
            )
            found = list(sent)
            device_plan.hosts = HostTables(found[0], found[1], max(tokens), found[2])
        return device_plan.hosts

    def host_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer in host memory, as the GPU sees them: (pages, page_tokens, kv_heads, d)."""
        if self._seen is None:
            self._seen = on_gpu(self._pages, self.device)
        keys, values = self._seen[:, layer].unbind(3)
        return keys.transpose(1, 2), values.transpose(1, 2)

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
        if self._memory is not None:
            self._memory.close()


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
            assert sketch is not None
            if metadata.paged:
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
        worker.post(layer, plan)

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
        if not worker.collect(plan, found.numpy(), found_lse.numpy()):
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
