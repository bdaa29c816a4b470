# SPDX-License-Identifier: Apache-2.0
"""What all layers of a rank share on CUDA: host memory as the GPU sees it, a step's index arrays, streams, buffers."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.device.ask_kernels import AskKernels
from vllm_retrieval_attn.device.prefill_stream import Stage, send
from vllm_retrieval_attn.device.sketch import Sketch
from vllm_retrieval_attn.device.sketch_plan import SketchPlan
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.managed import ManagedMemory, can_share, let_workers_read
from vllm_retrieval_attn.store.pinning import Pinner

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.store.arena import Arena

logger = logging.getLogger("vllm.retrieval.memory")


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
    hosts: HostTables | None = None


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
        arena: of the rank. sketch: likewise. memory: the pages, if they do not lie in the shared file. scale: of the
            softmax.

    Attributes:
        ask_kernels: by which CPU workers answer within a graph; None where a sketch does without them.
    """

    def __init__(
        self,
        arena: "Arena",
        device: torch.device,
        sketch: Sketch | None,
        memory: ManagedMemory | None,
        scale: float,
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
        self.ask_kernels = AskKernels(lay, arena.views, scale, device) if sketch is None else None

    def plan(self, plan: "StepPlan") -> DevicePlan:
        """Send a step's index arrays to the GPU, once for all layers."""
        if plan.device is None:
            lay = self._layout
            targets = plan.mirror_pages * lay.page_elements + plan.mirror_offsets * lay.row_elements

            def sent(array: Any) -> torch.Tensor:
                return send(array, self.device)

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
            table_dev, lens_dev, starts_dev = (send(part, self.device) for part in (table, lens, starts))
            device_plan.hosts = HostTables(table_dev, lens_dev, max(tokens), starts_dev)
        return device_plan.hosts

    @property
    def pages(self) -> torch.Tensor:
        """Arena.pages as the GPU sees them."""
        if self._seen is None:
            self._seen = on_gpu(self._pages, self.device)
        return self._seen

    def host_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer in host memory, as the GPU sees them: (pages, page_tokens, kv_heads, d)."""
        keys, values = self.pages[:, layer].unbind(3)
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
