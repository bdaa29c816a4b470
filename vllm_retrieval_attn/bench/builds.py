"""Time of building the index of one segment, part by part, alone on its device.

    python -m vllm_retrieval_attn.bench.builds

*transform*: what only a request's first segment needs. Milliseconds for all heads together, the mean of some runs
after one to warm up; on a CPU on one thread.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn.index.build import Spaces, build_segment, query_matrices
from vllm_retrieval_attn.index.calibrate import calibrated_share
from vllm_retrieval_attn.index.segment import SegmentShape


def measure(device: torch.device, heads: int, tokens: int, dim: int, sampled: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each part, for random bfloat16 keys and values.

    Args:
        heads: KV heads at once. tokens: of the segment. sampled: queries of a KV head to calibrate with.
    """
    torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def milliseconds(work: Callable[[], object]) -> float:
        work()
        begin = settled()
        for _ in range(repeats):
            work()
        return (settled() - begin) / repeats * 1e3

    shape = SegmentShape(tokens, dim)
    keys, values = random(2, heads, tokens, dim).bfloat16()
    queries, lse = random(heads, sampled, dim), torch.full((heads, sampled), 20.0, device=device)
    moment, turns = queries.mT @ queries, torch.zeros(heads, device=device)
    slabs = torch.zeros(heads, shape.bytes, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        spaces = Spaces.of(query_matrices(keys, moment))
        return {
            "transform": milliseconds(lambda: query_matrices(keys, moment)),
            "build": milliseconds(lambda: build_segment(shape, keys, values, spaces, turns, slabs)),
            "calibration": milliseconds(lambda: calibrated_share(shape, slabs, keys.float(), spaces, queries, lse)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=256, help="KV heads of all layers at once (Llama-3-8B has 256)")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--sampled", type=int, default=64, help="sampled queries of a KV head")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = measure(torch.device(given.device), given.heads, given.tokens, given.dim, given.sampled, given.repeats)
    print(f"{given.heads} KV heads, {given.tokens:,} tokens, d = {given.dim}, {given.device}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part, value in found.items():
        table.add_row(part, f"{value:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
