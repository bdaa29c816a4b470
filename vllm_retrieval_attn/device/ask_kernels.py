# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels by which CPU workers answer decode rows within a graph (ask.cu): their arguments and launches."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.device.launching import Kernels, failed, packed
from vllm_retrieval_attn.index.rows import BFLOAT16
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.views import Views

_MAIN = "ask.cu"
_THREADS = {"ask_workers": 512, "take_answers": 256, "attend_late": 256}
HEADER, FIELDS, WRITE_FIELDS = 5, 3, 2
_MOST_SPLITS, _PARTS = 8, 4096
"""Parts of a row's host tokens that different blocks attend to where workers are late, at most, and such parts of all
rows and KV heads together. Eight blocks keep the link busy."""
TOLD_LATE, TOLD_MISSED, TOLD_WAITED, TOLD_FAILED = range(4)
"""What a step tells: something but 0 where it was late; layers that were not answered; nanoseconds waited, over all
layers; and, for each row of the message, something but 0 where its search failed in some layer."""
_KEPT = 4

Numbers = npt.NDArray[np.int64]


class Asked(NamedTuple):
    """What a step asks and writes.

    Attributes:
        rows: (n, 3) int64, of each row of the message: its batch token, page table and host tokens.
        writes: (m, 2) int64, batch tokens whose K and V go to the host, and the element within a layer's pages where.
        step: number of its first message (RingClient.open_step). late: the workers are not to be asked.
        limit_ns: how long to wait for an answer.
    """

    rows: Numbers
    writes: Numbers
    step: int
    late: bool
    limit_ns: int


def descriptor_numbers(layout: Layout) -> int:
    """int64 numbers of a descriptor."""
    return HEADER + layout.max_rows * (FIELDS + WRITE_FIELDS)


def describe(asked: Asked, layout: Layout, out: Numbers) -> None:
    """Write a step's descriptor into ``out``, descriptor_numbers of them."""
    rows, writes = len(asked.rows), len(asked.writes)
    if max(rows, writes) > layout.max_rows:
        raise RuntimeError(f"retrieval: a step with {rows} rows and {writes} tokens for the host has no descriptor")
    out[:HEADER] = rows, writes, asked.step, asked.late, asked.limit_ns
    out[HEADER : HEADER + rows * FIELDS] = asked.rows.reshape(-1)
    first = HEADER + layout.max_rows * FIELDS
    out[first : first + writes * WRITE_FIELDS] = asked.writes.reshape(-1)


class AskKernels:
    """The kernels of one rank. Launches go to torch's current stream and may be captured into a graph.

    Args:
        layout, views: the shared file of the rank, whose leading part and pages the GPU can use. scale: of the softmax.
        device: where scratch lies.

    Attributes:
        descriptor: descriptor_numbers int64, read by all launches. told: (TOLD_FAILED + max_rows,) int64, pinned.
    """

    def __init__(self, layout: Layout, views: Views, scale: float, device: torch.device) -> None:
        lay = layout
        items = lay.max_rows * lay.kv_heads
        self._splits = splits = max(1, min(_MOST_SPLITS, _PARTS // items))
        pinned = device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.descriptor = zeros(descriptor_numbers(lay))
        self.told = torch.zeros(TOLD_FAILED + lay.max_rows, dtype=torch.int64, pin_memory=pinned)
        self._work = (
            zeros(_KEPT), zeros(items, dtype=torch.int32), zeros(items, dtype=torch.int32),
            zeros(items, splits, lay.group, lay.dim, dtype=torch.float32),
            zeros(items, splits, lay.group, 2, dtype=torch.float32),
        )  # fmt: skip
        shared = (views.pages, views.words, views.tables, views.queries, views.outside, views.partials)
        addresses = [int(part.ctypes.data) for part in shared]
        if addresses[0] % 16 or addresses[3] % 16:
            raise failed("buffers", "pages and queries must be aligned to 16 bytes")
        self._state = packed(
            lay.layers, lay.kv_heads, lay.max_rows, lay.actors, lay.pages, lay.page_tokens, lay.table_pages, splits,
            float(scale), self.descriptor, *addresses, self.told, *self._work,
        )  # fmt: skip
        self._load(lay, device)

    def _load(self, lay: Layout, device: torch.device) -> None:
        dtype = "bfloat16" if lay.dtype_code == BFLOAT16 else "float16"
        self._kernels = kernels = Kernels(_MAIN, lay.dim, lay.group, dtype, _THREADS, device)
        items = lay.max_rows * lay.kv_heads
        kernels.set_grid("ask_workers", 1)
        kernels.set_grid("take_answers", min(items, kernels.multiprocessors))
        kernels.set_grid("attend_late", min(items * self._splits, kernels.resident("attend_late")))

    def _launch(self, name: str, tokens: np.ndarray[Any, Any]) -> None:
        self._kernels.launch(name, self._state, tokens)

    def layer(
        self,
        layer: int,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Post a layer's message, wait for the answer, and merge it into ``out``.

        Args:
            inputs: query (T, heads, d), key and value (T, kv_heads, d), dense last axis, 16-byte aligned rows.
            out: (T, heads, d), attention over the paged tokens, updated. lse: (heads, T) float32, its log-sum-exp.
        """
        query, key, value = inputs
        for part in inputs:
            if part.stride(-1) != 1 or part.stride(0) % 8 or part.stride(1) % 8 or part.data_ptr() % 16:
                raise failed("decode kernels", "queries, keys and values need 16-byte aligned rows")
        strides = (part.stride(axis) for part in (key, value, query, out, lse) for axis in (0, 1))
        tokens = packed(layer, key, value, query, out, lse, *strides)
        for name in _THREADS:
            self._launch(name, tokens)
