# SPDX-License-Identifier: Apache-2.0
"""The host tokens that a prefill chunk attends to, streamed to the GPU through two buffers, in the order of their use.

Pages of the shared file are copied by the copy engines, those in managed memory by a kernel on a few multiprocessors
(device/decode_fetch.cuh).

Which pages are wanted, layer after layer, is known when a step begins. So a buffer is filled again as soon as it is
free, also with what the next layer will read first, while the GPU is still at this one.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.store.layout import Layout

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.decode_kernels import DecodeKernels
    from vllm_retrieval_attn.device.plan import HostRow

STAGE_BYTES = 256 << 20
"""Both buffers together: the fewer the pieces, the less is spent on merging them."""


def send(array: Any, device: torch.device) -> torch.Tensor:
    """A NumPy array on its way to the GPU, on the current stream."""
    return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True)


class Stage:
    """The buffers, for the life of the process.

    Args:
        layout: of the arena. arena: (pages, layers, kv_heads, page_tokens, 2, dim), on the host. device: the GPU.
        kernels: that fetch pages which the copy engines do not read; None where they do.

    Attributes:
        pages: of a buffer. table: (1, pages) int32 block table of a buffer.
    """

    def __init__(
        self, layout: Layout, arena: torch.Tensor, device: torch.device, kernels: "DecodeKernels | None"
    ) -> None:
        self.device, self.arena, self._kernels = device, arena, kernels
        self.pages = max(1, min(STAGE_BYTES // 2 // layout.page_layer_bytes, layout.pages))
        shape = (2, self.pages, layout.kv_heads, layout.page_tokens, 2, layout.dim)
        self.buffers = torch.empty(shape, dtype=arena.dtype, device=device)
        self.table = torch.arange(self.pages, dtype=torch.int32, device=device)[None]
        self.stream = torch.cuda.Stream(device, priority=-1)  # a kernel that fetches gets the next free processors
        self.full = [torch.cuda.Event() for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in range(2)]

    def fetch(self, buffer: int, layer: int, pages: list[int], numbers: torch.Tensor) -> None:
        """Fill a buffer with pages of a layer, on the current stream; ``numbers``: the same pages, on the GPU."""
        target = self.buffers[buffer]
        if self._kernels is not None:
            self._kernels.fetch(layer, numbers, target)
            return
        for place, page in enumerate(pages):
            target[place].copy_(self.arena[page, layer], non_blocking=True)


class PrefillStream:
    """One step's way through the buffers.

    Args:
        stage: the buffers. rows: of the step that have host tokens, in the order in which every layer asks for them.
    """

    def __init__(self, stage: Stage, rows: "list[HostRow]") -> None:
        self._stage = stage
        layers, page_tokens = stage.arena.shape[1], stage.arena.shape[3]
        pieces: list[tuple[list[int], int]] = []
        self.counts: list[int] = []
        for row in rows:
            pages = row.store.pages[: -(-row.host_tokens // page_tokens)]
            # Pieces of one size: behind a short one, the next would not be there in time.
            size = -(-len(pages) // -(-len(pages) // stage.pages))
            starts = range(0, len(pages), size)
            for first in starts:
                group = pages[first : first + size]
                pieces.append((group, min(row.host_tokens - first * page_tokens, len(group) * page_tokens)))
            self.counts.append(len(starts))
        self._pieces = pieces

        def sent(numbers: Any, dtype: Any) -> torch.Tensor:
            return send(np.array(numbers, dtype), stage.device)

        self._tokens = sent([tokens for _, tokens in pieces], np.int32)
        self._numbers = sent([page for group, _ in pieces for page in group], np.int64).split(
            [len(group) for group, _ in pieces]
        )
        self.starts = sent([[0, row.last - row.first] for row in rows], np.int32)
        self._all = len(pieces) * layers
        self._next = self._taken = 0
        ready = torch.cuda.Event()
        ready.record()  # what earlier steps wrote to the arena has arrived, and their use of the buffers is over
        stage.stream.wait_event(ready)
        for _ in range(2):
            self._fetch()

    def _fetch(self) -> None:
        if self._next == self._all:
            return
        stage, number = self._stage, self._next
        layer, piece = divmod(number, len(self._pieces))
        buffer = number % 2
        with torch.cuda.stream(stage.stream):
            if number >= 2:
                stage.stream.wait_event(stage.free[buffer])
            stage.fetch(buffer, layer, self._pieces[piece][0], self._numbers[piece])
            stage.full[buffer].record()
        self._next += 1

    def take(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The next piece, on the current stream: buffer (pages, kv_heads, page_tokens, 2, dim), and its tokens as a
        tensor (1,) int32 and as a number."""
        number = self._taken
        torch.cuda.current_stream().wait_event(self._stage.full[number % 2])
        piece = number % len(self._pieces)
        return self._stage.buffers[number % 2], self._tokens[piece : piece + 1], self._pieces[piece][1]

    def done(self) -> None:
        """What was taken is in use by kernels already issued: fill its buffer again behind them."""
        self._stage.free[self._taken % 2].record()
        self._taken += 1
        self._fetch()


def stream_of(plan: Any, stage: Stage) -> PrefillStream:
    """The stream of a StepPlan, made by its first layer."""
    if plan.stream is None:
        plan.stream = PrefillStream(stage, plan.prefill)
    stream: PrefillStream = plan.stream
    return stream
