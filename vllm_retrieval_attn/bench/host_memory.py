# SPDX-License-Identifier: Apache-2.0
"""Host memory as a server with a GPU has it, for benchmarks of single parts."""

import torch

from vllm_retrieval_attn.device.decode_step import PAGE, Geometry
from vllm_retrieval_attn.index.rows import DTYPE_CODES
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.managed import ManagedMemory
from vllm_retrieval_attn.store.page_tensor import page_tensor
from vllm_retrieval_attn.store.pinning import Pinner
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views

MEMORIES = ("managed", "registered")
"""Kinds: as with a sketch (store/managed.py), and as without (store/pinning.py)."""


class HostMemory:
    """Pages of all layers, taken as a server takes them.

    Args:
        geometry: shapes. kind: of MEMORIES.

    Attributes:
        pages: (pages, layers, kv_heads, PAGE, 2, d), not contiguous (store/layout.py). address: of the first one.
    """

    def __init__(self, geometry: Geometry, kind: str) -> None:
        g = geometry
        layout = Layout(
            layers=g.layers, heads=g.kv_heads * g.group, kv_heads=g.kv_heads, dim=g.dim, itemsize=2,
            dtype_code=DTYPE_CODES[g.dtype], page_tokens=PAGE, pages=g.host_pages, max_rows=g.rows,
            table_pages=g.host_pages, actors=1, threads=1,
        )  # fmt: skip
        self._file = SharedFile.create(layout.file_bytes, rank=0)
        views = Views(layout, self._file.map)
        self._pinner: Pinner | None = None
        self._managed: ManagedMemory | None = None
        if kind == "managed":
            self._managed = ManagedMemory(layout.all_pages_bytes, torch.cuda.current_device())
            views.pages = self._managed.array
        else:
            self._pinner = Pinner(int(views.pages.ctypes.data) - layout.pages_offset, layout)
        self.pages = page_tensor(layout, views, getattr(torch, g.dtype))
        self.address = int(views.pages.ctypes.data)

    def close(self) -> None:
        """Give it back."""
        torch.cuda.synchronize()
        del self.pages
        for memory in (self._pinner, self._managed):
            if memory is not None:
                memory.close()
        self._file.close()
