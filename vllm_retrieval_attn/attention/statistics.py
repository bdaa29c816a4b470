"""Statistics of prompt queries, gathered in prefill, from which an index takes its space and its calibration.

For each KV head: the second moment of the last RECENT queries of a chunk over the query heads that share it, and a
few of these queries with the log-sum-exp of their whole attention, which take no part in the moment.
"""

from typing import TYPE_CHECKING

import torch

from vllm_retrieval_attn.store.layout import SAMPLES

if TYPE_CHECKING:
    from vllm_retrieval_attn.store.layout import Layout

RECENT = 1024


class QueryStatistics:
    """Statistics of each live request's latest chunk; what a page table number held before is overwritten.

    Args:
        layout: shapes. shared: (max_rows, layers, kv_heads, head_statistics) float32 tensor over the shared file.
        device: where queries are.
    """

    def __init__(self, layout: "Layout", shared: torch.Tensor, device: torch.device) -> None:
        self._layout, self._shared = layout, shared
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
        if n < 2 * SAMPLES:
            return
        grouped = queries.view(n, lay.kv_heads, lay.group, lay.dim).permute(1, 2, 0, 3)  # (kv_heads, group, n, d)
        stride = n // SAMPLES
        sampled = grouped[:, :, stride - 1 :: stride][:, :, :SAMPLES].float()
        sampled_lse = lse.view(n, lay.kv_heads, lay.group).permute(1, 2, 0)[:, :, stride - 1 :: stride][:, :, :SAMPLES]
        pooled = grouped.reshape(lay.kv_heads, -1, lay.dim)
        held_back = sampled.reshape(lay.kv_heads, -1, lay.dim)
        moment = torch.bmm(pooled.mT, pooled).float() if self._on_host else _moment(pooled)
        moment = (moment - held_back.mT @ held_back) / (pooled.shape[1] - held_back.shape[1])
        parts = (moment, held_back, sampled_lse.float())
        flat = torch.cat([part.reshape(lay.kv_heads, -1) for part in parts], 1)
        self._target(slot)[layer, :, : flat.shape[1]] = flat

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
        lay = self._layout
        first = lay.dim * lay.dim + lay.group * SAMPLES * lay.dim
        self._shared[slot, :, :, : lay.dim * lay.dim] = torch.eye(lay.dim).reshape(-1)
        self._shared[slot, :, :, first : first + lay.group * SAMPLES] = -torch.inf


def _moment(rows: torch.Tensor) -> torch.Tensor:
    """``rows^T rows`` in float32 from half-precision (H, n, d) on a GPU, a few hundred rows at a time."""
    total = torch.zeros(rows.shape[0], rows.shape[2], rows.shape[2], device=rows.device)
    for part in rows.split(512, dim=1):
        whole = part.float()
        total += whole.mT @ whole
    return total
