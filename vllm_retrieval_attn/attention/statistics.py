"""Statistics of prompt queries, gathered in prefill, from which an index takes its space and its calibration.

For each KV head: the second moment of the last RECENT queries of a chunk over the query heads that share it, and a
few of these queries with the log-sum-exp of their whole attention, which take no part in the moment.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_retrieval_attn.store.layout import Layout
    from vllm_retrieval_attn.store.views import Views

RECENT = 1024
FEWEST = 16
"""Samples of a query head; a chunk with fewer leaves the statistics of the one before."""


class QueryStatistics:
    """Statistics of each live request's latest chunk; what a page table number held before is overwritten.

    Args:
        layout, views: the shared file of the rank. device: where queries are.
    """

    def __init__(self, layout: "Layout", views: "Views", device: torch.device) -> None:
        self._layout, self._views = layout, views
        self._shared = torch.from_numpy(views.statistics)
        self._on_host = device.type == "cpu"
        self._latest: dict[int, torch.Tensor] = {}
        self._device = device

    def update(self, slot: int, layer: int, queries: torch.Tensor, lse: torch.Tensor) -> None:
        """Note a chunk's queries.

        Args:
            slot: page table of the request. queries: (n, heads, d). lse: (n, heads) of their whole attention.
        """
        lay = self._layout
        queries, lse = queries[-RECENT:], lse[-RECENT:]
        n = len(queries)
        samples = min(lay.samples, n // 2)
        if samples < min(lay.samples, FEWEST):
            return
        grouped = queries.view(n, lay.kv_heads, lay.group, lay.dim).permute(1, 2, 0, 3)  # (kv_heads, group, n, d)
        stride = n // samples
        sampled = grouped[:, :, stride - 1 :: stride][:, :, :samples].float()
        sampled_lse = lse.view(n, lay.kv_heads, lay.group).permute(1, 2, 0)[:, :, stride - 1 :: stride][:, :, :samples]
        pooled = grouped.reshape(lay.kv_heads, -1, lay.dim)
        held_back = sampled.reshape(lay.kv_heads, -1, lay.dim)
        moment = torch.bmm(pooled.mT, pooled).float() if self._on_host else _moment(pooled)
        moment = (moment - held_back.mT @ held_back) / (pooled.shape[1] - held_back.shape[1])
        missing = (0, lay.samples - samples)
        sampled = torch.nn.functional.pad(sampled, (0, 0, *missing))
        sampled_lse = torch.nn.functional.pad(sampled_lse.float(), missing, value=-torch.inf)
        parts = (moment, sampled, sampled_lse)
        self._target(slot)[layer] = torch.cat([part.reshape(lay.kv_heads, -1) for part in parts], 1)

    def _target(self, slot: int) -> torch.Tensor:
        if self._on_host:
            return self._shared[slot]
        if slot not in self._latest:
            lay = self._layout
            shape = (lay.layers, lay.kv_heads, lay.head_statistics)
            self._latest[slot] = torch.zeros(shape, device=self._device)
        return self._latest[slot]

    def publish(self, slot: int) -> None:
        """Put the statistics where builders read them. Waits for the GPU."""
        if slot in self._latest:
            self._shared[slot].copy_(self._latest[slot])

    def forget(self, slot: int) -> None:
        """The page table changes hands: no sample is left to calibrate the next request with."""
        self._latest.pop(slot, None)
        self._views.moments[slot] = np.eye(self._layout.dim, dtype=np.float32)
        self._views.sample_lse[slot] = -np.inf


def _moment(rows: torch.Tensor) -> torch.Tensor:
    """``rows^T rows`` in float32 from half-precision (H, n, d) on a GPU, a few hundred rows at a time."""
    total = torch.zeros(rows.shape[0], rows.shape[2], rows.shape[2], device=rows.device)
    for part in rows.split(512, dim=1):
        whole = part.float()
        total += whole.mT @ whole
    return total
