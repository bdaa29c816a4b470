# SPDX-License-Identifier: Apache-2.0
"""How fast the GPU reads single rows from host memory, by the kind of that memory and by how far apart they lie.

`python -m vllm_retrieval_attn.bench.link`: rows of 512 bytes at random places, inside one CUDA graph of 32 reads, each
of other rows within one range, the next one in the next, as the layers of a decode step do. `cold`: 256 MB of GPU
memory are read before each, as the weights of a layer are, and only the difference counts: what a cache held of the
translations of addresses is gone then. Prints one JSON row for each kind and number of ranges.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_retrieval_attn.bench.host_memory import MEMORIES, HostMemory
from vllm_retrieval_attn.device.decode_step import PAGE, Geometry

_ROW = 256
"""Elements of a row: K and V of 128 dimensions."""
_READS = 32


@triton.jit
def _read_rows(base, numbers, out, ROW: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles the signature
    number = tl.load(numbers + tl.program_id(0)).to(tl.int64)
    row = (base.to(tl.int64) + number * (2 * ROW)).to(tl.pointer_type(tl.bfloat16))
    place = tl.max_contiguous(tl.multiple_of(row + tl.arange(0, ROW), ROW), ROW)  # 16 bytes a load
    total = tl.sum(tl.load(place).to(tl.float32))
    if total == 12345.678:  # never: but the compiler can not know
        tl.store(out, total)


def microseconds(once: Callable[[int], Any], repeats: int) -> float:
    """Median time of one of _READS calls that one graph makes."""

    def all_of_them() -> None:
        for number in range(_READS):
            once(number)

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / _READS)
    return statistics.median(found)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of :func:`main`."""
    pages = int(args.host_gb * 1e9) // (_READS * 8 * PAGE * 2 * _ROW)
    geometry = Geometry(_READS, 8, 4, _ROW // 2, "bfloat16", 1, pages, pages, 1, 1.0)
    size = pages * 8 * PAGE
    out, weights = torch.zeros(1, device="cuda"), torch.zeros(64 << 20, device="cuda")
    for kind in MEMORIES:
        host = HostMemory(geometry, kind)
        torch.manual_seed(0)
        numbers = [torch.randint(0, size, (args.rows,), device="cuda") for _ in range(_READS)]
        try:
            for ranges in (1, 4, 16, 32):
                sets = [part + size * (turn % ranges) for turn, part in enumerate(numbers)]

                def read(turn: int, sets: list[torch.Tensor] = sets, address: int = host.address) -> None:
                    _read_rows[(args.rows,)](address, sets[turn], out, ROW=_ROW, num_warps=1)

                def read_cold(turn: int, read: Callable[[int], Any] = read) -> None:
                    torch.sum(weights, 0, out=out[0])
                    read(turn)

                warm = microseconds(read, args.repeats)
                stream = microseconds(lambda _: torch.sum(weights, 0, out=out[0]), args.repeats)
                cold = microseconds(read_cold, args.repeats) - stream
                yield {
                    "memory": kind, "range_gb": round(size * 2 * _ROW / 1e9, 2), "ranges": ranges, "rows": args.rows,
                    "warm_us": round(warm, 1), "cold_us": round(cold, 1),
                    "cold_gb_s": round(args.rows * 2 * _ROW / cold / 1e3, 1), "device": torch.cuda.get_device_name(),
                }  # fmt: skip
        finally:
            host.close()


def main() -> None:
    """Microseconds of a read, and GB/s."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host-gb", type=float, default=16, help="host memory to take")
    parser.add_argument("--rows", type=int, default=4096, help="rows of a read: 512 of 8 KV heads")
    parser.add_argument("--repeats", type=int, default=7, help="replays timed")
    for row in measure(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
