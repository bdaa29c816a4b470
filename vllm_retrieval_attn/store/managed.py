# SPDX-License-Identifier: Apache-2.0
"""Host memory that the GPU reads fast: managed memory of CUDA, kept on the host for good.

What cudaHostRegister maps, the GPU sees in pages of 4 KB, whatever the system's are. Single rows from many gigabytes
then wait for their addresses to be translated: an H100 read 4,096 rows of 512 bytes in 82 us that it reads in 45 from
managed memory, which it sees in pages of 2 MB (`bench/link.py`). Two things are different from registered memory: no
other process can map it (index/elsewhere.py), and the copy engines do not read it (device/decode_fetch.cuh).
"""

import ctypes
import logging
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger("vllm.retrieval.memory")

_PIECE = 256 << 20
_MOST_THREADS = 16
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


def _called(what: str, result: Any) -> Any:
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"retrieval: {what} failed with {status}; lower host_memory_gb")
    return values[0] if values else None


def can_share(device: int) -> bool:
    """Whether the GPU may read managed memory while the CPU uses it: not under WSL, nor on most virtual GPUs."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
    return bool(_called("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, device)))


class ManagedMemory:
    """Zeros, all of them taken from the system at once.

    Args:
        size: bytes. device: number of the GPU.

    Attributes:
        address: of the first byte, for this process and the GPU. array: all bytes; not to be used once closed.

    Raises:
        RuntimeError: the driver does not give so much.
    """

    def __init__(self, size: int, device: int) -> None:
        from cuda.bindings import driver

        self._driver, self._device = driver, device
        torch.zeros(1, device=f"cuda:{device}")  # makes the context, if nothing has
        begin = time.monotonic()
        attach = driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL
        self.address = int(_called("cuMemAllocManaged", driver.cuMemAllocManaged(size, attach.value)))
        kinds, advice = driver.CUmemLocationType, driver.CUmem_advise
        self._advise(size, advice.CU_MEM_ADVISE_SET_PREFERRED_LOCATION, kinds.CU_MEM_LOCATION_TYPE_HOST, 0)
        self._advise(size, advice.CU_MEM_ADVISE_SET_ACCESSED_BY, kinds.CU_MEM_LOCATION_TYPE_DEVICE, device)
        raw: Any = (ctypes.c_char * size).from_address(self.address)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(raw, np.uint8)
        with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
            starts = range(0, size, _PIECE)
            list(pool.map(lambda at: ctypes.memset(self.address + at, 0, min(_PIECE, size - at)), starts))
        self._map(size)
        logger.info("retrieval: took %.1f GB of host memory in %.1f s", size / 1e9, time.monotonic() - begin)

    def _map(self, size: int) -> None:
        """Read a byte of every page on the GPU: what it does not have mapped yet is not left to the first request."""
        view = {"shape": (size // mmap.PAGESIZE,), "strides": (mmap.PAGESIZE,), "typestr": "|u1", "version": 3}
        pages: Any = type("Pages", (), {"__cuda_array_interface__": {**view, "data": (self.address, False)}})()
        torch.as_tensor(pages, device=f"cuda:{self._device}").max().item()

    def _advise(self, size: int, advice: Any, kind: Any, number: int) -> None:
        driver = self._driver
        place = driver.CUmemLocation()
        place.type, place.id = kind, number
        # CUDA 13 dropped the older call and its name.
        advise = getattr(driver, "cuMemAdvise_v2", driver.cuMemAdvise)
        _called("cuMemAdvise", advise(self.address, size, advice, place))

    def close(self) -> None:
        """Give it back. The GPU must be done with it."""
        if self.address:
            self._driver.cuMemFree(self.address)
            self.address = 0


def let_workers_read() -> None:
    """Let the CPU workers read this process's memory where Yama keeps processes from doing so that are no ancestors.
    Whether it helped is seen when they start (index/elsewhere.py, check_readable)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
