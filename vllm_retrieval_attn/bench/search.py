# SPDX-License-Identifier: Apache-2.0
"""One layer's search by the CPU workers, without an engine: `python -m vllm_retrieval_attn.bench.search`.

Real workers, shared file and messages; random keys, values and queries. Prints one JSON row.
"""

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.core.config import RetrievalConfig, resolve
from vllm_retrieval_attn.core.ownership import INDEX_BLOCK
from vllm_retrieval_attn.index.packing import bytes_per_key
from vllm_retrieval_attn.index.rows import BFLOAT16
from vllm_retrieval_attn.sketch.space import ROTATION
from vllm_retrieval_attn.store.arena import Arena
from vllm_retrieval_attn.store.layout import ROW_FIELDS, SLOT_SPACE, TAU_UNIT, Layout
from vllm_retrieval_attn.workers.client import RingClient
from vllm_retrieval_attn.workers.pool import WorkerPool

_REPEAT = 8
"""Messages to each layer that are timed, after two that are not."""


_DRAWN = 20


class LayerSearch:
    """Workers with ``layers`` layers of one request's random keys and values.

    Args:
        shape: KV heads, query heads of each, head size. tokens: on the host, a multiple of 32. knobs: of the product.
        layers: searched in turn, so that caches are cold as in a model.
    """

    def __init__(self, shape: tuple[int, int, int], tokens: int, layers: int, knobs: dict[str, Any]) -> None:
        kv_heads, group, dim = shape
        per_token = layers * kv_heads * dim * 4
        index = round(layers * kv_heads * bytes_per_key(dim))
        config = resolve(
            RetrievalConfig(host_memory_gb=1.05 * tokens * (per_token + index) / 1e9 + 0.1, **knobs),
            bytes_per_token=per_token, kv_heads=kv_heads, block_size=16, ranks=1, index_bytes_per_token=index,
        )  # fmt: skip
        self.config, self.tokens = config, tokens
        pages = -(-tokens // config.page_tokens)
        self.layout = Layout(
            layers=layers, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, itemsize=2, dtype_code=BFLOAT16,
            page_tokens=config.page_tokens, pages=pages, max_rows=2, table_pages=pages, actors=config.workers,
            threads=config.threads, most_limit=config.max_rows, indexed=True,
        )  # fmt: skip
        self.arena = Arena(self.layout, torch.bfloat16, 0)
        self.store = self.arena.open("request", 1)
        self.arena.grow(self.store, tokens)
        self.arena.views.slots[self.store.slot, SLOT_SPACE] = ROTATION
        torch.manual_seed(0)
        # Sums of two of some pages: drawing them all would take most of the time.
        drawn = torch.randn(_DRAWN, *self.arena.pages.shape[1:]).to(torch.bfloat16)
        pairs = itertools.cycle(itertools.combinations(range(_DRAWN), 2))
        for page, (one, other) in zip(self.arena.pages, pairs, strict=False):
            torch.add(drawn[one], drawn[other], out=page).mul_(0.5**0.5)
        # Scores of deviation 2: a few hundred keys in 128K carry half of the attention.
        self.arena.queries.copy_(torch.randn(self.arena.queries.shape) * 2)
        self.arena.outside.fill_(float(np.log(640) + 2))
        self.pool = WorkerPool(config, self.layout, self.arena.views, self.arena.file.path, dim**-0.5)
        self.client = RingClient(self.layout, self.arena.views, config.spin_ns, 120.0, self.pool.alive)
        shape_of_answer = (1, self.layout.heads, dim)
        self._out = np.empty(shape_of_answer, np.float32), np.empty(shape_of_answer[:2], np.float32)

    def index(self) -> float:
        """Let the workers index everything; seconds."""
        begin = time.perf_counter()
        self.arena.allow_indexing(self.store, self.tokens)
        for layer in range(self.layout.layers):
            self.ask(layer, 1024)
        return time.perf_counter() - begin

    def ask(self, layer: int, rows: int) -> float:
        """One message; seconds until its answer is there."""
        message = np.zeros((1, ROW_FIELDS), np.int64)
        message[0] = (
            self.store.slot, self.store.generation, self.tokens, self.tokens, self.tokens + 640, rows,
            round(1e-9 / TAU_UNIT), 0,
        )  # fmt: skip
        begin = time.perf_counter()
        self.client.post(layer, message)
        if len(self.client.collect(*self._out)):
            raise RuntimeError("the workers could not search; see Ray's logs")
        return time.perf_counter() - begin

    def close(self) -> None:
        self.pool.close()
        self.arena.close()


def measure(
    shape: tuple[int, int, int], tokens: int, layers: int, limits: list[int], knobs: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of :func:`main`, one for each limit on the rows read; arguments as LayerSearch's."""
    search = LayerSearch(shape, tokens, layers, knobs)
    try:
        index_s = search.index()
        found = []
        for rows in limits:
            for layer in range(2 * layers):
                search.ask(layer % layers, rows)
            times, lanes = [], []
            for number in range(_REPEAT * layers):
                times.append(search.ask(number % layers, rows) * 1e3)
                lanes.append(search.client.search_stats()[0] * 1e3)
            stats = search.client.search_stats()
            found.append(
                {
                    "tokens": tokens, "kv_heads": shape[0], "group": shape[1], "dim": shape[2],
                    "candidates": search.config.candidates, "scan": search.config.scan,
                    "workers": search.config.workers, "threads": search.config.threads,
                    "rows": rows, "rows_read": stats[2] // shape[0],
                    "message_ms_p50": round(statistics.median(times), 3),
                    "message_ms_p90": round(sorted(times)[len(times) * 9 // 10], 3),
                    "slowest_lane_ms_p50": round(statistics.median(lanes), 3),
                    "index_ms_per_1k_and_head": round(index_s * 1e6 / tokens / shape[0] / layers, 3),
                    "index_s": round(index_s, 2),
                }
            )  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
        return found
    finally:
        search.close()


def main() -> None:
    """One JSON row a limit: milliseconds from posting a layer's message until its answer is there, and of the slowest
    lane; milliseconds that 1,000 tokens of a KV head take to be indexed by all threads together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131_072, help="host tokens, a multiple of 32")
    parser.add_argument("--shape", default="8,4,128", help="KV heads, query heads of each, head size")
    parser.add_argument("--layers", type=int, default=4, help="layers searched in turn")
    parser.add_argument("--rows", default="512,1024", help="limits on the rows read")
    parser.add_argument("--candidates", type=int, default=RetrievalConfig.model_fields["candidates"].default)
    parser.add_argument("--scan", choices=("auto", "faiss"), default="auto", help="what scores the codes")
    parser.add_argument("--workers", type=int, help="Ray actors; default: as the product chooses")
    parser.add_argument("--threads", type=int, help="threads of each; default: as the product chooses")
    args = parser.parse_args()
    kv_heads, group, dim = (int(part) for part in args.shape.split(","))
    knobs = {"candidates": args.candidates, "scan": args.scan, "workers": args.workers, "threads": args.threads}
    limits = [int(part) for part in args.rows.split(",")]
    tokens = args.tokens // INDEX_BLOCK * INDEX_BLOCK
    measure((kv_heads, group, dim), tokens, args.layers, limits, knobs)


if __name__ == "__main__":
    main()
