# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels of a decode step cost, a layer: `python -m vllm_retrieval_attn.bench.kernels`.

Random keys, values and queries; K and V in host memory as a server has it. Each number is a median over replays of a
CUDA graph of `--layers` layers, which differ as far as `--host-gb` allows. The cost of a part is what the graph grows
by with it. Prints one JSON row.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.bench.host_memory import MEMORIES, HostMemory
from vllm_retrieval_attn.bench.timeline import KERNELS
from vllm_retrieval_attn.device.decode_kernels import Buffers, DecodeKernels, scratch
from vllm_retrieval_attn.device.decode_step import PAGE, Geometry, StepRow, descriptor_of, most_entries
from vllm_retrieval_attn.sketch.space import rotation


class Decode:
    """One rank's memory with random data, and the kernels over it.

    Args:
        args: of the command line. Rows of the batch have pages of their own, with the same content.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        pages = -(-(args.tokens + 1) // PAGE)
        captured = max(args.captured, args.rows_batch)
        all_pages = pages * args.rows_batch
        layer_bytes = all_pages * args.heads * PAGE * 4 * args.dim
        self.data_layers = max(1, min(args.layers, int(args.host_gb * 1e9 / layer_bytes)))
        self.geometry = Geometry(
            layers=self.data_layers, kv_heads=args.heads, group=args.group, dim=args.dim, dtype=args.dtype,
            rows=captured, entries=most_entries(all_pages, args.rows_batch), host_pages=all_pages,
            sketch_pages=all_pages, scale=args.dim**-0.5,
        )  # fmt: skip
        g, dtype = self.geometry, getattr(torch, args.dtype)
        torch.manual_seed(0)
        self.host = HostMemory(g, args.memory)
        sketch = torch.zeros(all_pages * g.sketch_page_bytes, dtype=torch.uint8, device="cuda")
        turn = torch.from_numpy(rotation(g.dim).astype(np.float32)).cuda()
        turns = turn.expand(2, g.layers, g.kv_heads, g.dim, g.dim).contiguous()
        mean = torch.zeros(2, g.layers, g.kv_heads, g.dim, device="cuda")
        self.descriptor = torch.zeros(g.descriptor_numbers, dtype=torch.int64, device="cuda")
        self.work = scratch(g)
        buffers = Buffers(self.host.address, sketch, mean, turns, turns, self.descriptor)
        self.kernels = DecodeKernels(g, buffers, self.work)
        for page in range(pages):
            self._fill(page, pages, turn, dtype)
        heads = g.kv_heads * g.group
        # Scores of deviation 2: a few hundred keys in 128K carry half of the attention.
        self.query = (2 * torch.randn(captured, heads, g.dim, device="cuda")).to(dtype)
        self.key, self.value = (
            torch.randn(captured, g.kv_heads, g.dim, device="cuda").to(dtype) for _ in range(2)
        )  # fmt: skip
        self.out = torch.randn(captured, heads, g.dim, device="cuda").to(dtype)
        self.lse = torch.full((heads, captured), math.log(640) + 2, device="cuda")
        self.weights = torch.randn(28672, 4096, device="cuda").bfloat16() if args.products else None
        self.state = torch.randn(captured, 4096, device="cuda").bfloat16()

    def _fill(self, page: int, pages: int, turn: torch.Tensor, dtype: torch.dtype) -> None:
        g = self.geometry
        targets = torch.arange(PAGE, device="cuda").repeat(2, 1).T.contiguous()
        for layer in range(g.layers):
            rows = torch.randn(g.kv_heads, PAGE, 2, g.dim, device="cuda").to(dtype)
            places = (rows[:, :, 0].float() @ turn.T).transpose(0, 1).contiguous()
            for row in range(self.args.rows_batch):
                self.host.pages[row * pages + page, layer].copy_(rows)
                targets[:, 0] = row * pages + page
                self.kernels.encode(layer, places, targets)

    def describe(self, tokens: int) -> None:
        """Let all rows of the batch have so many host tokens; the step's own token comes after them."""
        a, pages = self.args, self.geometry.host_pages // self.args.rows_batch
        numbers = [range(row * pages, (row + 1) * pages) for row in range(a.rows_batch)]
        rows = [
            StepRow(tokens, tokens, tokens + 640, a.rows, a.tau, 7 * row, 0, mine, mine)
            for row, mine in enumerate(numbers)
        ]
        if tokens == 0:
            rows = [StepRow(0, -1, 640, a.rows, a.tau, 0, 0, (), ())] * a.rows_batch
        self.descriptor.copy_(torch.from_numpy(descriptor_of(rows, self.geometry)))

    def layer(self, number: int, parts: int) -> None:
        """Launch the first ``parts`` kernels of a layer."""
        layer = number % self.data_layers
        steps: list[Callable[[], None]] = [
            lambda: self.kernels.write(layer, self.key, self.value, self.query),
            lambda: self.kernels.score(layer),
            lambda: self.kernels.weigh(self.lse),
            lambda: self.kernels.gather(layer, self.query),
            lambda: self.kernels.merge(self.out, self.lse),
        ]
        for step in steps[:parts]:
            step()

    def graph(self, parts: int) -> torch.cuda.CUDAGraph:
        """A graph of all layers."""
        self.layer(0, parts)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(self.args.layers):
                if self.weights is not None:
                    torch.mm(self.state, self.weights.T)
                self.layer(number, parts)
        return graph

    def microseconds(self, graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
        """Median time of a layer in each graph. Graphs take turns, so that drifts of the machine touch all alike."""
        times: list[list[float]] = [[] for _ in graphs]
        for repeat in range(self.args.repeats + 3):
            for graph, found in zip(graphs, times, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if repeat >= 3:
                    found.append(begin.elapsed_time(end) * 1e3 / self.args.layers)
        return [statistics.median(found) for found in times]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The row of :func:`main`."""
    decode = Decode(args)
    decode.describe(args.tokens)
    graphs = [decode.graph(parts) for parts in range(1, len(KERNELS) + 1)]
    base = decode.microseconds([decode.graph(0)])[0] if args.products else 0.0
    costs = [cost - base for cost in decode.microseconds(graphs)]
    whole = graphs[-1]
    decode.work.read.zero_()
    whole.replay()
    torch.cuda.synchronize()
    read = decode.work.read[: args.rows_batch].float().mean().item() / args.layers / args.heads
    decode.describe(0)
    idle = decode.microseconds([whole])[0] - base
    decode.host.close()
    parts = {f"{name}_us": round(b - a, 2) for name, a, b in zip(KERNELS.values(), [0.0, *costs], costs, strict=False)}
    given = {key: value for key, value in vars(args).items() if key not in ("json", "repeats")}
    return {
        **given, **parts, "layer_us": round(costs[-1], 2),
        "idle_layer_us": round(idle, 2), "rows_read_a_head": round(read, 1),
        "scratch_mib": round(decode.work.bytes / 2**20, 1), "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def options() -> argparse.ArgumentParser:
    """What this command takes; for that of cli_bench.py, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131_072, help="host tokens of each row")
    parser.add_argument("--rows-batch", type=int, default=1, help="rows of the batch")
    parser.add_argument("--captured", type=int, default=0, help="rows that the graph is captured for, if more")
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--dim", type=int, default=128, help="head size")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rows", type=int, default=512, help="keys read of a KV head, on average, at most")
    parser.add_argument("--tau", type=float, default=1e-3, help="weight from which on a key is always read")
    parser.add_argument("--layers", type=int, default=32, help="layers of the graph")
    parser.add_argument("--repeats", type=int, default=15, help="replays timed")
    parser.add_argument("--host-gb", type=float, default=20, help="host memory that layers rotate over, at most")
    parser.add_argument("--memory", default="managed", choices=MEMORIES, help="kind of the host memory")
    parser.add_argument("--products", action="store_true", help="a product with 235 MB of weights between layers")
    parser.add_argument("--json", action="store_true", help="print one JSON row, not lines")
    return parser


def main() -> None:
    """Microseconds a layer, of each kernel, of all, and of all where no row has host tokens."""
    args = options().parse_args()
    row = measure(args)
    print(json.dumps(row) if args.json else "\n".join(f"{key}: {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
