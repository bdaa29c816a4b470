# SPDX-License-Identifier: Apache-2.0
"""Rows of another process, copied and attended to."""

import subprocess
import sys

import numpy as np
import pytest

from vllm_retrieval_attn.index.elsewhere import (
    COPIED,
    attend_picked_from,
    attend_run_from,
    check_readable,
    copies,
    load_keys,
    load_paged_keys,
    read_bytes,
    source_of,
)
from vllm_retrieval_attn.index.rows import BFLOAT16, FLOAT16, FLOAT32, finish, running, scratch

DIM, ROWS = 32, 3 * COPIED + 17
_HOLDER = """
import sys
import numpy as np
rows = np.frombuffer(sys.stdin.buffer.read(int(sys.argv[1])), np.uint8).copy()
print(rows.ctypes.data, flush=True)
sys.stdin.buffer.read(1)
"""


@pytest.fixture(params=[FLOAT32, BFLOAT16, FLOAT16])
def both(request):
    """The same random rows at hand and in a process of their own, which ends with the test."""
    values = np.random.default_rng(0).standard_normal((ROWS, 2 * DIM), np.float32)
    stored = {FLOAT32: values, FLOAT16: values.astype(np.float16), BFLOAT16: values.view(np.uint16)[:, 1::2].copy()}
    buffer = stored[request.param].reshape(-1).view(np.uint8)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(len(buffer))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdin.write(buffer.tobytes())
    holder.stdin.flush()
    address = int(holder.stdout.readline())
    yield source_of(buffer, request.param), source_of(np.zeros(0, np.uint8), request.param, holder.pid, address), holder
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()


def attended(source, attend, *what):
    queries = np.random.default_rng(1).standard_normal((3, DIM), np.float32)
    run, out, lse = running(3, DIM), np.zeros((3, DIM), np.float32), np.zeros(3, np.float32)
    held = copies(DIM, source.memory.dtype)
    assert attend(source, *what, queries, run, scratch(3), held)
    finish(run, out, lse)
    return out, lse


@pytest.mark.parametrize("count", [0, 1, COPIED, COPIED + 1, ROWS - 5])
def test_a_run_comes_to_the_same(both, count):
    here, there, _ = both
    start = 5 * 2 * DIM
    for one, other in zip(attended(here, attend_run_from, start, count),
                          attended(there, attend_run_from, start, count), strict=True):  # fmt: skip
        assert np.array_equal(one, other)


@pytest.mark.parametrize("count", [0, 1, COPIED, 2 * COPIED + 3])
def test_single_rows_come_to_the_same(both, count):
    here, there, _ = both
    random = np.random.default_rng(2)
    starts = random.permutation(ROWS)[:count].astype(np.int64) * 2 * DIM
    log_pi = -random.random(count, np.float32)
    for one, other in zip(attended(here, attend_picked_from, starts, log_pi, count),
                          attended(there, attend_picked_from, starts, log_pi, count), strict=True):  # fmt: skip
        assert np.array_equal(one, other)


def test_keys_and_bytes_come_to_the_same(both):
    here, there, _ = both
    held = copies(DIM, here.memory.dtype)
    keys = np.zeros((2, ROWS - 3, DIM), np.float32)
    raw = np.zeros((2, 1000), np.uint8)
    for number, source in enumerate((here, there)):
        assert load_keys(source, 3 * 2 * DIM, held, keys[number])
        read_bytes(source, 3 * 2 * DIM, raw[number])
    assert np.array_equal(*keys)
    assert np.array_equal(*raw)
    assert keys[0].any()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 9), (4, 12), (7, 1), (1, 14)])
def test_keys_of_pages_are_those_of_their_rows(both, first, count):
    """Pages of 4 rows out of 6 that each has room for, in any order."""
    table, pages, base = np.array([5, 0, 3, 1]), np.array((4, 6 * 2 * DIM)), 2 * DIM
    for source in both[:2]:
        held = copies(DIM, source.memory.dtype)
        found, wanted = np.zeros((2, count, DIM), np.float32)
        assert load_paged_keys(source, table, pages, base, first, held, found)
        for n in range(count):
            page, row = divmod(first + n, 4)
            assert load_keys(source, (table[page] * 6 + 1 + row) * 2 * DIM, held, wanted[n : n + 1])
        assert np.array_equal(found, wanted)
        assert len(np.unique(found[:, 0])) == count


def test_a_process_that_is_gone_fails_and_is_told(both):
    _, there, holder = both
    check_readable(there)
    holder.kill()
    holder.wait()
    queries, held = np.ones((1, DIM), np.float32), copies(DIM, there.memory.dtype)
    starts, log_pi = np.zeros(1, np.int64), np.zeros(1, np.float32)
    assert not attend_picked_from(there, starts, log_pi, 1, queries, running(1, DIM), scratch(1), held)
    assert not attend_run_from(there, 0, 1, queries, running(1, DIM), scratch(1), held)
    assert not load_keys(there, 0, held, np.zeros((1, DIM), np.float32))
    pages = np.zeros(1, np.int64), np.array((4, 4 * 2 * DIM))
    assert not load_paged_keys(there, *pages, 0, 0, held, np.zeros((1, DIM), np.float32))
    with pytest.raises(PermissionError, match="set sketch_gb to 0"):
        check_readable(there)
