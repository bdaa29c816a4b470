"""Pinning the shared file for the GPU: the control block at once, pages slab by slab ahead of use.

Pinning takes about half a second a gigabyte, so a background thread stays one slab ahead of the
highest page handed out.
"""

import ctypes
import logging
import threading
import time
from typing import Any

import torch

from vllm_retrieval_attn.store.layout import Layout

logger = logging.getLogger("vllm.retrieval")

SLAB_BYTES = 1 << 30
_MAPPED_PORTABLE = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Pinner:
    """Registers ranges of a mapped file with CUDA.

    Args:
        address: where the file is mapped. layout: its shape. device: the GPU of this rank.
    """

    def __init__(self, address: int, layout: Layout, device: torch.device) -> None:
        self._address, self._layout, self._device = address, layout, device
        self._slab_pages = max(1, SLAB_BYTES // layout.page_bytes)
        self._slabs = -(-layout.pages // self._slab_pages)
        self._pinned = 0
        self._wanted = 0
        self._error: Exception | None = None
        self._registered: list[int] = []
        self._change = threading.Condition()
        self._closing = False
        self._register(0, layout.pinned_bytes)  # the GPU reads and writes nothing of the index
        self._thread = threading.Thread(target=self._run, name="retrieval-pin", daemon=True)
        self._thread.start()
        self.reserve(0)

    def reserve(self, page: int) -> None:
        """Wait until ``page`` is pinned; the slab after it is pinned meanwhile.

        Raises:
            RuntimeError: the system refuses to pin more memory.
        """
        slab = page // self._slab_pages
        if slab < self._pinned and slab + 1 < self._wanted:
            return
        with self._change:
            self._wanted = max(self._wanted, min(slab + 2, self._slabs))
            self._change.notify_all()
            while self._pinned <= slab and self._error is None:
                self._change.wait()
            if self._pinned <= slab:
                raise RuntimeError(f"retrieval: {self._error}; lower host_memory_gb")

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while True:
            with self._change:
                while not self._closing and (self._pinned >= self._wanted or self._error is not None):
                    self._change.wait()
                if self._closing:
                    return
                slab = self._pinned
            first = slab * self._slab_pages
            pages = min(self._slab_pages, self._layout.pages - first)
            page_bytes = self._layout.page_bytes
            begin = time.monotonic()
            try:
                self._register(self._layout.pages_offset + first * page_bytes, pages * page_bytes)
            except RuntimeError as error:
                with self._change:
                    self._error = error
                    self._change.notify_all()
                continue
            logger.debug("retrieval: pinned slab %d in %.2f s", slab, time.monotonic() - begin)
            with self._change:
                self._pinned = slab + 1
                self._change.notify_all()

    def _register(self, offset: int, length: int) -> None:
        cudart: Any = torch.cuda.cudart()
        # Huge pages, where the system gives them to shared memory, make pinning several times faster.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(self._address + offset), ctypes.c_size_t(length), 14)
        status = cudart.cudaHostRegister(self._address + offset, length, _MAPPED_PORTABLE)
        if int(status) != 0:
            raise RuntimeError(f"pinning {length / 1e9:.1f} GB of host memory failed with CUDA error {int(status)}")
        self._registered.append(self._address + offset)

    def close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout=5)
        cudart: Any = torch.cuda.cudart()
        for address in self._registered:
            cudart.cudaHostUnregister(address)
