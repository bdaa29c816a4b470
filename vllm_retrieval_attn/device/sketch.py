# SPDX-License-Identifier: Apache-2.0
"""The sketch on the GPU: 4-bit codes of all host keys, and the decode steps that choose and read rows by them.

The memory is taken when the model is loaded, so that vLLM's profiling counts it; the arena, whose rows are read, comes
later. Every step sends one descriptor to a fixed place on the GPU; a captured graph reads it there.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.device.decode_kernels import STAMPS, Buffers, DecodeKernels, parts_of, scratch
from vllm_retrieval_attn.device.decode_step import Geometry, describe
from vllm_retrieval_attn.sketch.space import LEARNED, Space, rotation
from vllm_retrieval_attn.store.code_pages import CodePages

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.sketch_plan import SketchPlan

_SLOTS = 6
"""Descriptors that may be on their way: more than steps that vLLM keeps in flight."""
MOST_SHARE = 0.4
"""Of the memory that the weights leave, by default."""


@dataclass
class _Sent:
    """A step whose counters are not read yet: its requests, and the event after which they lie in ``counts``."""

    ids: list[str | None]
    counts: torch.Tensor
    arrived: Any


class Sketch:
    """Codes, spaces, scratch and kernels of one rank.

    Args:
        geometry: shapes. device: the GPU. together: see CodePages; geometry.entries must be enough for it.

    Attributes:
        codes: which request has which page. kernels: see device/decode_kernels.py.
        branch: stream of what runs beside the scoring of a layer.
    """

    def __init__(self, geometry: Geometry, device: torch.device, together: int) -> None:
        self.geometry, self._device = geometry, device
        self.codes = CodePages(geometry.sketch_pages, together)
        layers, heads, dim = geometry.layers, geometry.kv_heads, geometry.dim
        turn = torch.from_numpy(rotation(dim).astype(np.float32)).to(device)
        turns = turn.expand(2, layers, heads, dim, dim)
        self._buffers = Buffers(
            arena=0,
            sketch=torch.zeros(geometry.sketch_pages * geometry.sketch_page_bytes, dtype=torch.uint8, device=device),
            mean=torch.zeros(2, layers, heads, dim, dtype=torch.float32, device=device),
            keys=turns.contiguous(),
            queries=turns.contiguous(),
            descriptor=torch.zeros(geometry.descriptor_numbers, dtype=torch.int64, device=device),
        )
        self._work = scratch(geometry, device)
        self.kernels = DecodeKernels(geometry, self._buffers, self._work)
        self.branch = torch.cuda.Stream(device)
        numbers, rows = geometry.descriptor_numbers, geometry.rows
        self._staged = [torch.zeros(numbers, dtype=torch.int64, pin_memory=True) for _ in range(_SLOTS)]
        self._free = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._counts = [torch.zeros(rows + STAMPS, dtype=torch.int64, pin_memory=True) for _ in range(_SLOTS)]
        self._slot = 0
        self._open: list[str | None] | None = None
        self._sent: list[_Sent] = []
        self._parts: dict[str, float] = {}
        self._caches: dict[int, torch.Tensor] = {}
        self._slots: dict[int, torch.Tensor] = {}

    @property
    def pool(self) -> torch.Tensor:
        """All codes: blocks of Geometry.block_bytes, as DecodeKernels' buffer ``sketch``."""
        return self._buffers.sketch

    @property
    def bytes(self) -> int:
        """Bytes of the GPU that this holds beside the codes."""
        parts = (self._buffers.mean, self._buffers.keys, self._buffers.queries, self._buffers.descriptor)
        return self._work.bytes + sum(part.numel() * part.element_size() for part in parts)

    def connect(self, arena_address: int) -> None:
        """Tell the kernels where the arena lies, pinned. Graphs captured before read no row."""
        self._buffers = self._buffers._replace(arena=arena_address)
        self.kernels.move(self._buffers)

    def set_space(self, space: Space) -> None:
        """Take the model's own space, those of all KV heads, layer after layer; requests opened from now on use it."""
        for target, part in zip(self._buffers[2:5], (space.mean, space.keys, space.queries), strict=True):
            target[LEARNED] = torch.from_numpy(part).to(self._device).view_as(target[LEARNED])

    def send(self, plan: "SketchPlan | None") -> None:
        """Let the kernels of this step see ``plan``'s rows; None: no row."""
        slot = self._slot = (self._slot + 1) % _SLOTS
        self._free[slot].synchronize()  # long ago, unless many steps are in flight
        staged = self._staged[slot]
        used = describe([] if plan is None else plan.rows, self.geometry, staged.numpy())
        self._buffers.descriptor[:used].copy_(staged[:used], non_blocking=True)
        self._free[slot].record()
        self._open = None if plan is None or not plan.attends else plan.ids

    def finish(self) -> None:
        """The step's kernels are under way: let their counters follow."""
        if self._open is None:
            return
        counts = self._counts[self._slot]
        counts.copy_(self._work.read, non_blocking=True)
        self._work.read.zero_()
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent.append(_Sent(self._open, counts, arrived))
        self._open = None

    def write_after_last(self, layer: int, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Note where a layer's paged cache has the step's tokens; after the last layer, write those of all.

        Args:
            cache: (blocks, H, block, 2 * d). slots: (T,) int64, kept at its place as long as the graph.
        """
        self._caches[layer], self._slots[layer] = cache, slots
        if len(self._caches) == self.geometry.layers:
            order = range(self.geometry.layers)
            self.kernels.write_layers([self._caches[i] for i in order], [self._slots[i] for i in order])
            self._caches.clear()
            self._slots.clear()

    def encode(self, layer: int, space: int, keys: torch.Tensor, targets: torch.Tensor) -> None:
        """Code keys (T, H, d) of any type; targets as DecodeKernels.encode has them."""
        centred = keys.float() - self._buffers.mean[space, layer]
        places = torch.bmm(centred.transpose(0, 1), self._buffers.keys[space, layer].transpose(1, 2))
        self.kernels.encode(layer, places.transpose(0, 1).contiguous(), targets)

    def take_parts(self) -> dict[str, float]:
        """Mean seconds of each part of a layer in the newest step that :meth:`take_counts` saw; empty if none since."""
        parts, self._parts = self._parts, {}
        return parts

    def take_counts(self) -> dict[str, tuple[int, int]]:
        """Of every request whose steps are done since the last call: rows read, and by how many KV heads and layers."""
        found: dict[str, tuple[int, int]] = {}
        searches = self.geometry.layers * self.geometry.kv_heads
        while self._sent and (len(self._sent) >= _SLOTS - 1 or self._sent[0].arrived.query()):
            step = self._sent.pop(0)
            step.arrived.synchronize()
            self._parts = parts_of(step.counts[-STAMPS:].numpy())
            for request_id, rows in zip(step.ids, step.counts[: len(step.ids)].tolist(), strict=True):
                if request_id is not None and rows:
                    before = found.get(request_id, (0, 0))
                    found[request_id] = before[0] + rows, before[1] + searches
        return found


def pages_for(geometry: Geometry, wanted: int, limit_bytes: float | None, free_bytes: int) -> int:
    """Pages of a sketch: ``wanted`` at most, within the limit or, without one, within MOST_SHARE of what is free.

    Raises:
        ValueError: there is no room for one page.
    """
    room = MOST_SHARE * free_bytes if limit_bytes is None else limit_bytes
    pages = min(wanted, int(room / geometry.sketch_page_bytes))
    if pages < 1:
        raise ValueError(
            f"{room / 1e9:.2f} GB of GPU memory hold no page of codes ({geometry.sketch_page_bytes / 1e9:.2f} GB)"
        )
    return pages


_sketch: Sketch | None = None


def current_sketch() -> Sketch | None:
    """The sketch of this process, if there is one."""
    return _sketch


def keep_sketch(sketch: Sketch | None) -> None:
    """Make it the process's."""
    global _sketch
    _sketch = sketch
