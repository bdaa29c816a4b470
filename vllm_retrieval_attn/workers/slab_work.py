"""Writing the slabs of index `attention` for the KV heads of an actor: a build, and a look at its calibration."""

from collections.abc import Callable

import numpy as np
import torch

from vllm_retrieval_attn.index.blas import one_blas_thread
from vllm_retrieval_attn.index.build import Spaces, build_segment, query_matrices
from vllm_retrieval_attn.index.calibrate import calibrated_share
from vllm_retrieval_attn.index.kernels import BFLOAT16, FLOAT16
from vllm_retrieval_attn.index.segment import HEAD_SHARE, SegmentShape
from vllm_retrieval_attn.store.layout import JOB_SEGMENT, JOB_SLAB, JOB_TABLE, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.builder import Job

Write = Callable[[list[int], torch.Tensor], None]
"""Takes where slabs begin in the index memory, and (n, slab_bytes) uint8 of them."""

DRIFT = 1.5
"""Calibrate again where sampled queries are so many times as far out, in the metric of the prompt's queries, as those
of the prompt are: docs/index.md, "Drift"."""


def torch_pages(layout: Layout, views: Views) -> torch.Tensor:
    """The pages as (pages, layers, kv_heads, 2, page_tokens, d) of their own type."""
    dtype = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}.get(layout.dtype_code, torch.float32)
    shape = (layout.pages, layout.layers, layout.kv_heads, 2, layout.page_tokens, layout.dim)
    return torch.from_numpy(views.pages).view(dtype).view(shape)


def segment_rows(memory: torch.Tensor, pages: torch.Tensor, layer: int, heads: list[int]) -> torch.Tensor:
    """(H, 2, tokens, d) float32 keys and values of some KV heads; ``memory`` as :func:`torch_pages` gives it."""
    rows = memory[pages, layer][:, heads]  # (pages, H, 2, page_tokens, d)
    return rows.permute(1, 2, 0, 3, 4).flatten(2, 3).float()


class SlabWork:
    """For workers/builder.py, see there; and for attention/cuda_builder.py, which builds several layers at once.

    Args:
        layout, views: the shared file of the rank. heads: KV heads to build for.
        scale: softmax scale. share: of keys to scan; 0: calibrate for each KV head.
    """

    def __init__(self, layout: Layout, views: Views, heads: list[int], scale: float, share: float) -> None:
        self._layout, self._views, self._scale, self._share = layout, views, scale, share
        self._shape = SegmentShape(layout.segment_tokens, layout.dim)
        self._heads = heads
        self._pages = torch_pages(layout, views)
        self._index = torch.from_numpy(views.index8).view(torch.uint8)

    def build(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        self.build_layers(range(layer, layer + 1), segment_rows(self._pages, pages, layer, self._heads), job)

    def build_layers(self, layers: range, rows: torch.Tensor, job: Job, write: Write | None = None) -> None:
        """Write the slabs of some layers.

        Args:
            rows: (len(layers) * heads, 2, tokens, d) keys and values, any float type, on the device to build on.
            write: takes the slabs from that device instead of :meth:`write`.
        """
        device = rows.device
        table, slab = int(job[JOB_TABLE]), int(job[JOB_SLAB])
        moment, queries, lse = (part.to(device) for part in self._statistics(layers, table))
        turns = self._turns(layers, table)
        if job[JOB_SEGMENT] == 0:
            to_queries = query_matrices(rows[:, 0], moment)
            self._keep_matrices(turns, to_queries)
        else:
            to_queries = self._matrices(turns).to(device).float()
        # From here on nothing waits for the device (tests/gpu): kernels are launched while earlier ones run.
        slabs = self._slabs(rows, to_queries, turns.to(device), queries, lse)
        (write or self.write)(self._slab_starts(layers, slab), slabs)

    def rehearse(self, rows: torch.Tensor) -> torch.Tensor:
        """Slabs of some rows, as in :meth:`build_layers`, which belong to nothing."""
        lay = self._layout
        heads, most = len(rows), lay.group * lay.samples
        queries = torch.randn(heads, most, lay.dim, device=rows.device)
        lse, turns = torch.zeros(heads, most, device=rows.device), torch.zeros(heads, device=rows.device)
        return self._slabs(rows, query_matrices(rows[:, 0], queries.mT @ queries), turns, queries, lse)

    def _slabs(
        self,
        rows: torch.Tensor,
        to_queries: torch.Tensor,
        turns: torch.Tensor,
        queries: torch.Tensor,
        lse: torch.Tensor,
    ) -> torch.Tensor:
        spaces = Spaces.of(to_queries)
        slabs = torch.zeros(len(rows), self._layout.slab_bytes, dtype=torch.uint8, device=rows.device)
        build_segment(self._shape, rows[:, 0], rows[:, 1], spaces, turns, slabs, self._share or 1.0)
        if not self._share:
            keys = rows[:, 0].float()
            shares = calibrated_share(self._shape, slabs, keys, spaces, queries * self._scale, lse)
            slabs[:, HEAD_SHARE * 8 : HEAD_SHARE * 8 + 8] = shares.double()[:, None].view(torch.uint8)
        return slabs

    def write(self, starts: list[int], slabs: torch.Tensor) -> None:
        """Put slabs (n, slab_bytes), in host memory, where they belong."""
        memory = self._views.index8.view(np.uint8)  # NumPy copies without the interpreter's lock
        for begin, own in zip(starts, slabs.numpy(), strict=True):
            memory[begin : begin + len(own)] = own

    def refresh(self, layer: int, pages: torch.Tensor, job: Job) -> None:
        """Calibrate again the KV heads whose sampled queries have drifted away from the prompt's."""
        layers = range(layer, layer + 1)
        table, slab = int(job[JOB_TABLE]), int(job[JOB_SLAB])
        moment, queries, lse = self._statistics(layers, table)
        drifted = (drift(moment, queries) > DRIFT) & (lse > -torch.inf).all(1)
        if self._share or not drifted.any():
            return
        size = self._layout.slab_bytes
        starts = self._slab_starts(layers, slab)
        slabs = torch.stack([self._index[begin : begin + size] for begin in starts])
        keys = segment_rows(self._pages, pages, layer, self._heads)[:, 0]
        spaces = Spaces.of(self._matrices(self._turns(layers, table)).float())
        shares = calibrated_share(self._shape, slabs, keys, spaces, queries * self._scale, lse)
        for begin, share, moved in zip(starts, shares, drifted, strict=True):
            if moved:  # eight aligned bytes: a search sees the old share or the new one
                self._views.index64[begin // 8 + HEAD_SHARE] = float(share)

    def _statistics(self, layers: range, table: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(H, d, d) moment, (H, m, d) sampled queries, unscaled, and their (H, m) LSE, m = group * samples; H counts
        layers and KV heads."""
        lay, views = self._layout, self._views
        moments, samples, lse = (
            torch.from_numpy(part[table, layers.start : layers.stop][:, self._heads])
            for part in (views.moments, views.samples, views.sample_lse)
        )
        return (
            moments.flatten(0, 1),
            samples.reshape(-1, lay.group * lay.samples, lay.dim),
            lse.flatten(2).flatten(0, 1),
        )

    def _turns(self, layers: range, table: int) -> torch.Tensor:
        """(H,) where the transforms lie, in elements."""
        lay = self._layout
        numbers = [(table * lay.layers + layer) * lay.kv_heads + head for layer in layers for head in self._heads]
        return torch.tensor(numbers) * (lay.dim * lay.dim)

    def _matrices(self, turns: torch.Tensor) -> torch.Tensor:
        """(H, d, d) bfloat16 transforms of queries."""
        memory, dim = self._turn_memory(), self._layout.dim
        return torch.stack([memory[t : t + dim * dim].view(dim, dim) for t in turns.tolist()])

    def _keep_matrices(self, turns: torch.Tensor, to_queries: torch.Tensor) -> None:
        memory = self._turn_memory()
        for turn, matrix in zip(turns.tolist(), to_queries.bfloat16().cpu(), strict=True):
            memory[turn : turn + matrix.numel()] = matrix.reshape(-1)

    def _turn_memory(self) -> torch.Tensor:
        return self._index[: self._layout.slabs_offset - self._layout.turns_offset].view(torch.bfloat16)

    def _slab_starts(self, layers: range, slab: int) -> list[int]:
        lay = self._layout
        base = lay.slabs_offset - lay.turns_offset + slab * lay.segment_slab_bytes
        return [base + (layer * lay.kv_heads + head) * lay.slab_bytes for layer in layers for head in self._heads]


def drift(moment: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """How far out queries are in the metric of a second moment; 1 for the queries that the moment is of.

    Args:
        moment: (H, d, d). queries: (H, m, d).

    Returns:
        (H,) mean of ``q^T moment^-1 q / d``.
    """
    dim = moment.shape[-1]
    whole = moment.double().numpy()
    level = np.trace(whole, axis1=1, axis2=2) / dim * 1e-3
    whole = whole + level[:, None, None] * np.eye(dim)
    rows = queries.double().numpy()
    one_blas_thread()
    solved = np.linalg.solve(whole, rows.swapaxes(1, 2)).swapaxes(1, 2)  # torch's: see Spaces.of
    return torch.from_numpy((rows * solved).sum(-1).mean(-1) / dim)
