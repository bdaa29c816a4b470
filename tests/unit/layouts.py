# SPDX-License-Identifier: Apache-2.0
"""Small layouts for tests."""

import torch

from vllm_retrieval_attn.index.rows import DTYPE_CODES
from vllm_retrieval_attn.store.layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_layout(
    dtype: str = "float32", actors: int = 1, threads: int = 1, kv_heads: int = 1, group: int = 2, dim: int = 16,
    layers: int = 2, page_tokens: int = 64, max_rows: int = 6, table_pages: int = 6, indexed: bool = False,
) -> Layout:  # fmt: skip
    """A layout in which every request could own as many pages as its table has."""
    return Layout(
        layers=layers, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, itemsize=DTYPES[dtype].itemsize,
        dtype_code=DTYPE_CODES[dtype], page_tokens=page_tokens, pages=max_rows * table_pages, max_rows=max_rows,
        table_pages=table_pages, actors=actors, threads=threads, indexed=indexed,
    )  # fmt: skip
