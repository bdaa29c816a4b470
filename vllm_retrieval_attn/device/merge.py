# SPDX-License-Identifier: Apache-2.0
"""Merging partial attention results over disjoint sets of keys, by log-sum-exp.

Source: FlashAttention's split softmax (arXiv 2205.14135, section 3.1); RetrievalAttention
(arXiv 2409.10516, section 3.3) merges the GPU's and the CPU's part the same way.
"""

import torch


def merge_partials(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets.

    Args:
        out, more: (..., d) float32 attention over each set.
        lse, more_lse: (...) float32 natural log-sum-exp of the scaled scores; -inf for an empty set.

    Returns:
        Output and log-sum-exp over the union. Both sets empty: zeros and -inf.
    """
    top = torch.maximum(lse, more_lse)
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    a, b = torch.exp(lse - safe), torch.exp(more_lse - safe)
    both = a + b
    scale = torch.where(both > 0, both, torch.ones_like(both))
    merged = (out * a[..., None] + more * b[..., None]) / scale[..., None]
    return merged, safe + torch.log(both)
