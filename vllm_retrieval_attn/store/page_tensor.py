# SPDX-License-Identifier: Apache-2.0
"""The pages of an arena as a tensor. Apart from store/views.py, since CPU workers do without torch."""

import torch

from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.views import Views


def page_tensor(layout: Layout, views: Views, dtype: torch.dtype) -> torch.Tensor:
    """The pages as (pages, layers, kv_heads, page_tokens, 2, d) of their own type, however they lie."""
    lay = layout
    shape = (lay.layers, lay.pages, lay.kv_heads, lay.page_tokens, 2, lay.dim)
    return torch.from_numpy(views.pages).view(dtype).view(shape).transpose(0, 1)
