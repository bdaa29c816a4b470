# SPDX-License-Identifier: Apache-2.0
"""How fast one core attends to single rows in host memory: `python -m vllm_retrieval_attn.bench.rows`.

Rows of bfloat16 at random places of a shared file, in small pages and in huge ones (store/mapping.py). Prints a JSON
row for each number of rows.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_retrieval_attn.index.rows import BFLOAT16, attend_picked, memory_of, running, scratch
from vllm_retrieval_attn.store.mapping import map_file, take_memory

_ONE = 0x3C00
"""Every element: a small number in bfloat16."""


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of :func:`main`."""
    size = int(args.gb * (1 << 30))
    fd = os.memfd_create("rows")
    os.ftruncate(fd, size)
    buffer = np.frombuffer(map_file(fd, size), np.uint8)
    buffer.view(np.uint16)[:] = _ONE
    for huge in (False, True):
        if huge and take_memory(buffer.ctypes.data, size) == 0:
            return  # the system gives none
        for rows in args.rows:
            taken = _median_s(args, buffer, rows)
            yield {
                "huge_pages": huge, "rows": rows, "group": args.group, "dim": args.dim,
                "us": round(taken * 1e6, 2), "ns_a_row": round(taken / rows * 1e9, 1),
                "gb_s": round(rows * 4 * args.dim / taken / 1e9, 2),
            }  # fmt: skip
    os.close(fd)


def _median_s(args: argparse.Namespace, buffer: Any, rows: int) -> float:
    memory, run, work = memory_of(buffer, BFLOAT16), running(args.group, args.dim), scratch(args.group)
    random = np.random.default_rng(rows)
    queries = (random.standard_normal((args.group, args.dim)) * 0.01).astype(np.float32)
    log_pi = np.zeros(rows, np.float32)
    found = []
    for _ in range(args.repeats + 1):
        starts = np.sort(random.integers(0, buffer.size // (4 * args.dim), rows)) * 2 * args.dim
        begin = time.perf_counter()
        attend_picked(memory, starts, log_pi, rows, queries, run, work)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])  # the first one compiles


def main() -> None:
    """Microseconds, and GB/s of rows read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4, help="memory that rows lie in, GiB")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--group", type=int, default=4, help="query heads")
    parser.add_argument("--dim", type=int, default=128, help="head size")
    parser.add_argument("--repeats", type=int, default=200)
    for row in measure(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
