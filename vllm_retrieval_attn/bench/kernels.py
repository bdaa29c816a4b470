"""Speed of the search's inner loops beside what Faiss offers for the same work, one thread, the fastest of some runs.

    python -m vllm_retrieval_attn.bench.kernels

Codes: all keys scored by 4-bit codes of each dimension. Rows: all keys scored as they are; ours attends to them, that
is, it also weighs and adds up the values, where Faiss keeps the best keys.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn.index.build import pack_rows
from vllm_retrieval_attn.index.dot import dot_row, row_bytes, row_width
from vllm_retrieval_attn.index.kernels import BFLOAT16, attend_rows, jit, scratch

_faiss: Any = faiss


@jit
def score_codes(codes: Any, queries: Any, width: int, size: int, out: Any) -> None:
    """(g, n) int32 sums of code times query; a key's codes are read once for all queries, as in index/search.py."""
    group, n = out.shape
    source = codes.ctypes.data
    for key in range(n):
        for h in range(group):
            out[h, key] = dot_row(source, queries.ctypes.data + h * queries.shape[1], width, size)
        source += size


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the best of some runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(dim: int, keys: int, group: int, keep: int, repeats: int) -> list[tuple[str, str, float, float]]:
    """(what, by whom, ns per key and query, bytes read per key) for each way to score ``keys`` keys.

    Args:
        dim: head size. group: queries at once, the query heads of a KV head. keep: keys that Faiss finds.
    """
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    rows = random.standard_normal((keys, dim), np.float32)
    queries = random.standard_normal((group, dim), np.float32)
    found = []

    def note(what: str, whom: str, work: Callable[[], object], size: float) -> None:
        found.append((what, whom, fastest(work, repeats) / keys / group * 1e9, size))

    size = row_bytes(dim)
    codes = pack_rows(torch.from_numpy(random.integers(0, 16, (keys, dim), np.uint8))).numpy()
    small = np.zeros((group, 2 * size), np.int8)
    small[:, :dim] = random.integers(-127, 128, (group, dim))
    out = np.empty((group, keys), np.int32)
    note("codes", "ours", lambda: score_codes(codes, small, row_width(dim), size, out), size)
    indexes = {
        "Faiss FastScan": faiss.IndexPQFastScan(dim, dim, 4, faiss.METRIC_INNER_PRODUCT),
        "Faiss scalar 4-bit": faiss.IndexScalarQuantizer(
            dim, _faiss.ScalarQuantizer.QT_4bit, faiss.METRIC_INNER_PRODUCT
        ),
        "Faiss scalar bf16": faiss.IndexScalarQuantizer(
            dim, _faiss.ScalarQuantizer.QT_bf16, faiss.METRIC_INNER_PRODUCT
        ),
        "Faiss flat float32": faiss.IndexFlatIP(dim),
    }
    sizes = {"Faiss scalar bf16": 2.0 * dim, "Faiss flat float32": 4.0 * dim}
    for name, index in indexes.items():
        if not index.is_trained:
            _faiss.Index.train(index, rows[:16384])
        index.add(rows)
        what = "rows" if name in sizes else "codes"
        note(what, name, partial(index.search, queries, min(keep, keys)), sizes.get(name, dim / 2))
    pages = torch.from_numpy(np.concatenate((rows, rows))).bfloat16().view(torch.int16).numpy().view(np.uint16).ravel()
    work = scratch(group, dim)

    def attend() -> None:
        acc, top, total = np.zeros_like(queries), np.full(group, -np.inf, np.float32), np.zeros(group, np.float32)
        attend_rows(pages, pages.view(np.float32), BFLOAT16, 0, keys * dim, keys, queries, acc, top, total, *work)

    note("rows", "ours, values too", attend, 4.0 * dim)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=lambda value: [int(part) for part in value.split(",")], default=[64, 128])
    parser.add_argument("--keys", type=int, default=1 << 17)
    parser.add_argument("--group", type=int, default=4, help="queries that share a KV head")
    parser.add_argument("--keep", type=int, default=800, help="keys that Faiss finds: the default of rerank")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    table = Table(box=box.SIMPLE_HEAD, title=f"{arguments.keys:,} keys, {arguments.group} queries, one thread")
    for name in ("d", "what", "by", "ns per key and query", "bytes per key"):
        table.add_column(name, justify="left" if name in ("what", "by") else "right")
    for dim in arguments.dims:
        for what, whom, ns, size in measure(dim, arguments.keys, arguments.group, arguments.keep, arguments.repeats):
            table.add_row(str(dim), what, whom, f"{ns:.2f}", f"{size:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
