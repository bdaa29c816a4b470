"""How fast the GPU reads single rows from host memory, by how far apart they lie.

`python -m vllm_retrieval_attn.bench.link`: rows of 512 bytes at random places, in memory made and pinned as a server's
arena, inside one CUDA graph of 32 reads, each of other rows. `wide`: all reads go anywhere within the range; `by
turns`: each stays within one range, the next one in the next, as the layers of a decode step do. Prints one JSON row
for each range.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_retrieval_attn.bench.kernels import HostMemory
from vllm_retrieval_attn.device.decode_step import PAGE, Geometry

_ROW = 256
"""Elements of a row: K and V of 128 dimensions."""
_READS = 32


@triton.jit
def _read_rows(base, numbers, out, ROW: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton compiles the signature
    number = tl.load(numbers + tl.program_id(0)).to(tl.int64)
    row = base.to(tl.int64).to(tl.pointer_type(tl.bfloat16)) + number * ROW
    total = tl.sum(tl.load(row + tl.arange(0, ROW)).to(tl.float32))
    if total == 12345.678:  # never: but the compiler can not know
        tl.store(out, total)


def microseconds(address: int, sets: list[torch.Tensor], repeats: int) -> float:
    """Median time of one read, of a graph that reads all ``sets`` of row numbers (int64, on the GPU) one by one."""
    out = torch.zeros(1, device="cuda")

    def read_all() -> None:
        for numbers in sets:
            _read_rows[(len(numbers),)](address, numbers, out, ROW=_ROW, num_warps=1)

    read_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read_all()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(found)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of :func:`main`."""
    pages = int(args.host_gb * 1e9) // (32 * 8 * PAGE * 2 * _ROW)
    geometry = Geometry(32, 8, 4, _ROW // 2, "bfloat16", 1, pages, pages, 1, 1.0)
    host = HostMemory(geometry)
    whole = pages * 32 * 8 * PAGE
    torch.manual_seed(0)
    try:
        for part in (64, 32, 16, 8, 4, 2, 1):
            size = whole // part
            wide = [torch.randint(0, size, (args.rows,), device="cuda") for _ in range(_READS)]
            turns = [numbers + size * (turn % part) for turn, numbers in enumerate(wide)]
            times = {"wide": wide, "by_turns": turns}
            costs = {name: microseconds(host.address, sets, args.repeats) for name, sets in times.items()}
            speed = {f"{name}_gb_s": round(args.rows * 2 * _ROW / cost / 1e3, 1) for name, cost in costs.items()}
            yield {
                "range_gb": round(size * 2 * _ROW / 1e9, 3), "rows": args.rows,
                **{f"{name}_us": round(cost, 1) for name, cost in costs.items()}, **speed,
                "device": torch.cuda.get_device_name(),
            }  # fmt: skip
    finally:
        host.close()


def main() -> None:
    """Microseconds of a read, and GB/s."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host-gb", type=float, default=16, help="host memory to make and pin")
    parser.add_argument("--rows", type=int, default=4096, help="rows of a read: 512 of 8 KV heads")
    parser.add_argument("--repeats", type=int, default=7, help="replays timed")
    for row in measure(parser.parse_args()):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
