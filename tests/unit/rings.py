"""A ring with lanes as threads of the test (or of a child process), and attention by brute force."""

import json
import os
import sys
from dataclasses import asdict

import numpy as np
import torch

from vllm_retrieval_attn.index.kernels import DTYPE_CODES
from vllm_retrieval_attn.store.layout import ROW_FIELDS, WORD_CLIENT_PID, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.client import RingClient
from vllm_retrieval_attn.workers.lane import Lane

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_layout(
    dtype: str = "float32", actors: int = 1, threads: int = 1, kv_heads: int = 1, group: int = 2, dim: int = 16,
    layers: int = 2, page_tokens: int = 64, max_rows: int = 6, table_pages: int = 6,
) -> Layout:  # fmt: skip
    return Layout(
        layers=layers, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, itemsize=DTYPES[dtype].itemsize,
        dtype_code=DTYPE_CODES[dtype], page_tokens=page_tokens, pages=max_rows * table_pages, max_rows=max_rows,
        table_pages=table_pages, actors=actors, threads=threads,
    )  # fmt: skip


class Ring:
    """A shared file, its client, and lanes on demand. What no message may read is NaN."""

    def __init__(self, layout: Layout, dtype: str = "float32", scale: float = 0.25, spin_ns: int = 50_000) -> None:
        self.layout, self.scale, self.spin_ns = layout, scale, spin_ns
        self.file = SharedFile.create(layout.file_bytes, rank=90)
        self.views = Views(layout, self.file.map)
        self.views.words[WORD_CLIENT_PID] = os.getpid()
        self.views.pages[:] = 0xFF
        lay = layout
        shape = (lay.pages, lay.layers, lay.kv_heads, 2, lay.page_tokens, lay.dim)
        self.pages = torch.from_numpy(self.views.pages).view(DTYPES[dtype]).view(shape)
        queries = torch.from_numpy(self.views.queries).view(DTYPES[dtype])
        self.queries = queries.view(lay.max_rows, lay.heads, lay.dim)
        self.views.partials[:] = np.nan
        self.revived = 0
        self.on_revive = lambda: None
        self.client = RingClient(layout, self.views, spin_ns, self._revive)
        self.lanes: list[Lane] = []

    def _revive(self, since: float) -> float:
        self.revived += 1
        assert self.revived < 300, "no answer for 30 s"
        self.on_revive()
        return since

    def start(self, actor: int, thread: int) -> Lane:
        lane = Lane(self.layout, self.views, actor, thread, self.scale, self.spin_ns)
        lane.start()
        assert lane.ready.wait(300)
        self.lanes.append(lane)
        return lane

    def start_all(self) -> None:
        for actor in range(self.layout.actors):
            for thread in range(self.layout.threads):
                self.start(actor, thread)

    def stop_lanes(self) -> None:
        """End all lanes as if their processes had died; the ring itself is usable afterwards."""
        self.views.words[WORD_STOP] = 1
        for lane in self.lanes:
            lane.join(timeout=10)
            assert not lane.is_alive()
            assert lane.error is None
        self.lanes = []
        self.views.words[WORD_STOP] = 0

    def close(self) -> None:
        self.stop_lanes()
        self.client._views = self.views = self.pages = self.queries = None
        self.file.close()

    def fill(self, layer: int, tokens: list[int], seed: int = 0) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Random queries, page tables and host tokens of some rows; returns the message and float64 K/V a row."""
        lay = self.layout
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.views.tables[:] = -(1 << 40)
        self.views.pages[:] = 0xFF
        self.queries[:] = torch.randn(self.queries.shape).to(self.queries.dtype)
        free = random.permutation(lay.pages).tolist()
        slots, places = random.permutation(lay.max_rows), random.permutation(lay.max_rows)
        message = np.zeros((len(tokens), ROW_FIELDS), np.int64)
        stored = []
        for row, count in enumerate(tokens):
            message[row, :3] = slots[row], count, places[row]
            kv = torch.randn(lay.kv_heads, 2, count, lay.dim).to(self.pages.dtype)
            for number in range(lay.page_tokens_owned(count)):
                page = free.pop()
                self.views.tables[slots[row], number] = page
                part = kv[:, :, number * lay.page_tokens : (number + 1) * lay.page_tokens]
                self.pages[page, layer, :, :, : part.shape[2]] = part
            stored.append(kv.double())
        return message, stored

    def wanted(self, message: np.ndarray, stored: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of each row of a message by brute force, in float64."""
        lay = self.layout
        out = torch.zeros(len(message), lay.heads, lay.dim, dtype=torch.float64)
        lse = torch.full((len(message), lay.heads), -torch.inf, dtype=torch.float64)
        for row, kv in enumerate(stored):
            if kv.shape[2] == 0:
                continue
            q = self.queries[message[row, 2]].double() * self.scale
            for head in range(lay.heads):
                scores = kv[head // lay.group, 0] @ q[head]
                out[row, head] = torch.softmax(scores, 0) @ kv[head // lay.group, 1]
                lse[row, head] = torch.logsumexp(scores, 0)
        return out, lse

    def collect(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = np.full((rows, self.layout.heads, self.layout.dim), np.nan, np.float32)
        lse = np.full((rows, self.layout.heads), np.nan, np.float32)
        self.client.collect(out, lse)
        return torch.from_numpy(out), torch.from_numpy(lse)

    def check(self, layer: int, tokens: list[int], seed: int = 0, before_collect=lambda: None) -> None:
        """One message with random content is answered right."""
        message, stored = self.fill(layer, tokens, seed)
        self.client.post(layer, message)
        before_collect()
        got, got_lse = self.collect(len(tokens))
        want, want_lse = self.wanted(message, stored)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-5, rtol=1e-5)

    def child_arguments(self, actor: int, thread: int, spin_ns: int) -> list[str]:
        """Command line that serves a lane in a process of its own."""
        place = {"layout": asdict(self.layout), "actor": actor, "thread": thread, "scale": self.scale, "spin": spin_ns}
        return [sys.executable, "-m", "tests.unit.lane_process", self.file.path, json.dumps(place)]
