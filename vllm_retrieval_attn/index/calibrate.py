"""How much of a segment each KV head must scan: the share of keys that keeps the attention mass.

Prompt queries that took no part in the statistics are searched exactly when a segment is sealed. Leaves are taken in
the order in which a search would take them, and the share is the smallest that leaves no more than TARGET of a
query's whole attention outside, for all but the worst few queries; where clusters miss the mass this grows to the
whole segment, which then is a flat scan of its codes.
"""

import torch

from vllm_retrieval_attn.index.build import Spaces
from vllm_retrieval_attn.index.segment import STEP4, SegmentShape

TARGET = 0.004
"""Attention mass, of all a query's attention, that may be left to the tail estimate in one segment."""
QUANTILE = 0.9
SHARES = (0.2, 0.35, 0.6, 1.0)
"""Smaller shares looked enough to the prompt and were not: docs/index.md."""


def calibrated_share(
    shape: SegmentShape,
    slabs: torch.Tensor,
    keys: torch.Tensor,
    spaces: Spaces,
    queries: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """Share of keys to scan for each of H heads.

    Args:
        slabs: (H, shape.bytes) uint8, built. keys: (H, n, d) float32 of the segment.
        queries: (H, m, d) float32 sampled queries of all heads of the group, scaled.
        lse: (H, m) log-sum-exp of their whole attention; -inf for places without a sample.

    Returns:
        (H,) float32, one of SHARES.
    """
    heads, n, dim = keys.shape
    at = shape.offsets

    def part(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        return slabs[:, at[name] : at[name] + size].contiguous().view(dtype)

    order = part("order", n * 2, torch.uint16).long()
    ends = part("ends", shape.leaves * 2, torch.uint16).long()
    sizes = ends.diff(dim=1, prepend=torch.zeros(heads, 1, dtype=torch.long, device=ends.device))
    leaf = torch.searchsorted(ends, torch.arange(n, device=ends.device).expand(heads, -1).contiguous(), right=True)
    points = keys.gather(1, order[..., None].expand(-1, -1, dim))
    sums = torch.zeros(heads, shape.leaves, dim, device=keys.device)
    centroids = sums.scatter_add_(1, leaf[..., None].expand(-1, -1, dim), points) / sizes.clamp_min(1)[..., None]
    spread = (part("key_step", shape.leaves * 4, torch.float32) / STEP4).square()
    turned = queries @ spaces.to_queries.mT
    bonus = turned.square().sum(-1)[..., None] * spread[:, None] / 2
    weight = queries @ centroids.mT + bonus  # (H, m, leaves), as index/search.py ranks
    weight = weight.masked_fill(sizes[:, None] == 0, -torch.inf)
    mass = torch.exp((queries @ points.mT - lse[..., None]).clamp_max(0.0))
    mass = torch.zeros_like(weight).scatter_add_(2, leaf[:, None].expand(-1, queries.shape[1], -1), mass)
    rank = weight.argsort(-1, descending=True)
    scanned = sizes[:, None].expand_as(weight).gather(2, rank).cumsum(-1)
    kept = mass.gather(2, rank).cumsum(-1)
    missing = kept[..., -1:] - kept
    result = torch.ones(heads, device=keys.device)
    valid = lse > -torch.inf
    for share in reversed(SHARES):
        cut = (scanned <= share * n).sum(-1, keepdim=True).clamp_min(1) - 1
        lost = missing.gather(2, cut)[..., 0].masked_fill(~valid, torch.nan)
        worst = torch.nanquantile(lost, QUANTILE, dim=1)
        result = torch.where((worst <= TARGET) & valid.any(1), torch.full_like(result, share), result)
    return result
