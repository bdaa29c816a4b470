# SPDX-License-Identifier: Apache-2.0
"""Mapping the shared file so that it may lie in huge pages, and having the system give its memory.

Huge pages save most of the address translations that reading single rows from many gigabytes takes: 512 rows of 512
bytes, anywhere within 4 GB, took one core of an AMD EPYC 37 us instead of 65 (`bench/rows.py`). Linux gives them to
shared memory unasked only where an administrator says so; MADV_COLLAPSE (Linux 6.1, 2022) makes them of what is there.
"""

import ctypes
import mmap
import os
import weakref
from typing import Any

HUGE = 2 << 20
"""Bytes of a huge page, and what mappings are aligned to."""
_POPULATE_WRITE, _COLLAPSE = 23, 25  # of madvise
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
for _name in ("munmap", "madvise"):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] if _name == "madvise" else []))


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, 0)
    if found == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, f"mapping {size} bytes of shared memory: {os.strerror(error)}")
    return int(found)


def map_file(fd: int, size: int) -> Any:
    """A whole file, read-write, at a multiple of HUGE; as bytes (a ctypes array, which supports the buffer protocol).
    It stays mapped as long as anything refers to it.

    Raises:
        OSError: it cannot be mapped.
    """
    room = -(-size // HUGE) * HUGE + HUGE
    reserved = _mmap(None, room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-reserved // HUGE) * HUGE
    _mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)
    end = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    for first, last in ((reserved, address), (end, reserved + room)):
        if last > first:
            _libc.munmap(first, last - first)
    mapped = (ctypes.c_char * size).from_address(address)
    weakref.finalize(mapped, _libc.munmap, address, end - address).atexit = False
    return mapped


def take_memory(address: int, length: int) -> int:
    """Have the system give the memory of a part of a mapping, in huge pages where it can; what cannot be had is given
    at first use. Content stays.

    Args:
        address: a multiple of the page size. length: bytes.

    Returns:
        Bytes in huge pages.
    """
    first, last = -(-address // HUGE) * HUGE, (address + length) // HUGE * HUGE
    for block in range(first, last, HUGE):  # a block of which nothing is there is not collapsed
        byte = ctypes.c_char.from_address(block)
        byte.value = byte.value
    huge = last - first if last > first and _libc.madvise(first, last - first, _COLLAPSE) == 0 else 0
    _libc.madvise(address, length, _POPULATE_WRITE)
    return huge
