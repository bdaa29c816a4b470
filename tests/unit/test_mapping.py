# SPDX-License-Identifier: Apache-2.0
"""Mapping the shared file, and memory for it."""

import gc
import os
import re
from pathlib import Path

import numpy as np
import pytest

from vllm_retrieval_attn.store.mapping import HUGE, map_file, take_memory


def mapped(address: int) -> dict[str, int]:
    """Numbers of the mapping at an address, in KiB, by /proc/self/smaps; empty if there is none."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and (match := re.match(r"(\w+): +(\d+) kB", line)):
            found[match[1]] = int(match[2])
    return found


@pytest.fixture
def file():
    fd = os.memfd_create("mapping")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [5000, HUGE, 3 * HUGE + 4096])
def test_a_mapping_is_aligned_shared_and_ends_with_its_last_array(file, size):
    os.ftruncate(file, size)
    one, other = map_file(file, size), map_file(file, size)
    array = np.frombuffer(one, np.uint8)
    address = array.ctypes.data
    assert address % HUGE == 0
    assert len(one) == size
    other[size - 2 : size] = b"ab"
    assert one[size - 2 : size] == b"ab"
    assert mapped(address)["Size"] * 1024 == -(-size // 4096) * 4096
    del one
    gc.collect()
    assert array[-1] == ord("b")
    del array
    gc.collect()
    assert not mapped(address)


def test_memory_is_there_and_what_it_held_too(file):
    size = 4 * HUGE + 3 * 4096
    os.ftruncate(file, size)
    array = np.frombuffer(map_file(file, size), np.uint8)
    array[HUGE + 17], array[-1] = 3, 5
    first = 4096  # not at the start of a huge page, as slabs of pages need not be
    huge = take_memory(array.ctypes.data + first, size - first)
    numbers = mapped(array.ctypes.data)
    assert numbers["Rss"] * 1024 >= size - 4096
    assert huge in (0, 3 * HUGE)
    assert numbers.get("ShmemPmdMapped", 0) * 1024 == huge
    assert np.flatnonzero(array).tolist() == [HUGE + 17, size - 1]


def test_what_can_not_be_mapped_is_an_error(file):
    with pytest.raises(OSError, match="shared memory"):
        map_file(-1, HUGE)
