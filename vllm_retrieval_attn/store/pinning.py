# SPDX-License-Identifier: Apache-2.0
"""Pinning the shared file for the GPU, all of it at start: no request waits for it, and no graph is captured meanwhile.

Pages lie in the file where there is no sketch, so that the CPU workers read them in place and the copy engines bring
them to the GPU; otherwise elsewhere (store/managed.py).

Most of the time is the system's, for clearing memory at first touch; so threads take it side by side before CUDA is
asked to pin it (store/mapping.py).
"""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.mapping import take_memory

logger = logging.getLogger("vllm.retrieval.memory")

SLAB_BYTES = 1 << 30
_MAPPED_PORTABLE = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
_MOST_THREADS = 16


class Pinner:
    """Registers a mapped file with CUDA, but for what the GPU never reads.

    Args:
        address: where the file is mapped. layout: its shape; the file may have no pages.

    Raises:
        RuntimeError: the system refuses to pin so much memory.
    """

    def __init__(self, address: int, layout: Layout) -> None:
        begin = time.monotonic()
        self._registered: list[int] = []
        end = layout.file_bytes
        # Whole pages of a layer: a copy must not cross from one registration to the next.
        size = max(1, SLAB_BYTES // layout.page_layer_bytes) * layout.page_layer_bytes
        slabs = [(address + start, min(size, end - start)) for start in range(layout.pages_offset, end, size)]
        with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
            taken = pool.map(lambda slab: take_memory(*slab), slabs)
            huge = 0
            try:
                self._register(address, layout.pinned_bytes)
                for slab, in_huge_pages in zip(slabs, taken, strict=True):  # behind those that take it
                    huge += in_huge_pages
                    self._register(*slab)
            except RuntimeError:
                pool.shutdown(cancel_futures=True)
                self.close()
                raise
        if not slabs:
            return
        logger.info(
            "retrieval: pinned %.1f GB of host memory in %.1f s, %d %% of it in huge pages",
            (end - layout.pages_offset) / 1e9, time.monotonic() - begin, 100 * huge // (end - layout.pages_offset),
        )  # fmt: skip

    def _register(self, address: int, length: int) -> None:
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(address, length, _MAPPED_PORTABLE)
        if int(status) != 0:
            raise RuntimeError(
                f"retrieval: pinning {length / 1e9:.1f} GB of host memory failed with CUDA error {int(status)}; lower "
                "host_memory_gb"
            )
        self._registered.append(address)

    def close(self) -> None:
        cudart: Any = torch.cuda.cudart()
        for address in self._registered:
            cudart.cudaHostUnregister(address)
        self._registered.clear()
