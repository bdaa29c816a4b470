# SPDX-License-Identifier: Apache-2.0
"""A ring with an actor's parts as threads of the test (or of a child process), and attention by brute force."""

import json
import os
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch

from tests.unit.layouts import DTYPES
from vllm_retrieval_attn.sketch.space import ROTATION
from vllm_retrieval_attn.store.layout import (
    ROW_FIELDS,
    ROW_GENERATION,
    ROW_INDEXED,
    ROW_LIMIT,
    ROW_POSITION,
    ROW_TABLE,
    ROW_TAU,
    ROW_TOKENS,
    SLOT_GENERATION,
    SLOT_INDEXED,
    SLOT_SPACE,
    WORD_CLIENT_PID,
    WORD_GROWTH,
    WORD_STOP,
    Layout,
)
from vllm_retrieval_attn.store.page_tensor import page_tensor
from vllm_retrieval_attn.store.shared_file import SharedFile
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.client import RingClient
from vllm_retrieval_attn.workers.desk import Desk
from vllm_retrieval_attn.workers.indexes import Indexes
from vllm_retrieval_attn.workers.lane import LEADER, Lane

CANDIDATES = 256


class Ring:
    """A shared file, its client, and lanes on demand. What no message may read is NaN.

    ``elsewhere``: pages lie outside of the file, in what the lanes take for another process.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: str = "float32",
        scale: float = 0.25,
        spin_ns: int = 50_000,
        elsewhere: bool = False,
        limit_s: float = 60.0,
        by_faiss: bool = False,
    ) -> None:
        self.by_faiss = by_faiss
        own = np.zeros(layout.all_pages_bytes, np.uint8) if elsewhere else None
        layout = replace(layout, pages_at=own.ctypes.data) if own is not None else layout
        self.layout, self.scale, self.spin_ns = layout, scale, spin_ns
        self.file = SharedFile.create(layout.file_bytes, rank=90)
        self.views = Views(layout, self.file.map, own)
        self.lane_views = Views(layout, self.file.map)
        self.views.words[WORD_CLIENT_PID] = os.getpid()
        self.views.pages[:] = 0xFF
        lay = layout
        self.pages = page_tensor(lay, self.views, DTYPES[dtype])
        queries = torch.from_numpy(self.views.queries).view(DTYPES[dtype])
        self.queries = queries.view(lay.max_rows, lay.heads, lay.dim)
        self.views.partials[:] = np.nan
        self.asked = 0
        self.on_asked = lambda: True
        self.client = RingClient(layout, self.views, spin_ns, limit_s, self._alive)
        self.desks = [self._desk(actor) for actor in range(layout.actors)]
        self.lanes: list[Lane] = []

    def _desk(self, actor: int) -> Desk:
        indexes = Indexes(self.layout, self.lane_views, actor, self.by_faiss)
        return Desk(self.layout, self.lane_views, indexes, self.scale, CANDIDATES)

    def _alive(self) -> bool:
        self.asked += 1
        return self.on_asked()

    def await_idle(self) -> None:
        """Until the actors are done with a message that nobody waits for any more."""
        deadline = time.monotonic() + 300
        while not self.client.idle():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def start(self, actor: int, thread: int) -> Lane:
        lane = Lane(self.layout, self.lane_views, self.desks[actor], actor, thread, self.spin_ns)
        lane.start()
        assert lane.ready.wait(300)
        self.lanes.append(lane)
        return lane

    def start_all(self) -> None:
        for actor in range(self.layout.actors):
            for thread in (*range(self.layout.threads), LEADER):
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

    def restart(self) -> None:
        """All lanes end, and what the actors had in memory is gone."""
        self.stop_lanes()
        self.desks = [self._desk(actor) for actor in range(self.layout.actors)]
        self.start_all()

    def close(self) -> None:
        self.stop_lanes()
        self.client._views = self.views = self.lane_views = self.pages = self.queries = self.desks = None
        self.file.close()

    def fill(
        self, layer: int, tokens: list[int], seed: int = 0, indexed: list[int] | None = None, rows: int = 64
    ) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Random queries, page tables and host tokens of some rows; returns the message and float64 K/V a row."""
        lay = self.layout
        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.views.tables[:] = -(1 << 40)
        self.views.pages[:] = 0xFF
        self.views.slots[:, SLOT_GENERATION] = 0
        self.queries[:] = torch.randn(self.queries.shape).to(self.queries.dtype)
        self.views.outside[:] = torch.randn(self.views.outside.shape).numpy()
        free = random.permutation(lay.pages).tolist()
        slots = random.permutation(lay.max_rows)
        message = np.zeros((len(tokens), ROW_FIELDS), np.int64)
        message[:, ROW_TABLE] = slots[: len(tokens)]
        message[:, ROW_GENERATION] = 1 + seed * 100 + np.arange(len(tokens))
        message[:, ROW_TOKENS], message[:, ROW_INDEXED] = tokens, indexed or [0] * len(tokens)
        message[:, ROW_POSITION] = message[:, ROW_TOKENS] + 700
        message[:, ROW_LIMIT], message[:, ROW_TAU] = rows, 1000
        stored = []
        for row, count in enumerate(tokens):
            slot = self.views.slots[slots[row]]
            slot[SLOT_GENERATION], slot[SLOT_SPACE] = message[row, ROW_GENERATION], ROTATION
            slot[SLOT_INDEXED] = message[row, ROW_INDEXED]
            kv = torch.randn(lay.kv_heads, count, 2, lay.dim).to(self.pages.dtype)
            for number in range(lay.page_tokens_owned(count)):
                page = free.pop()
                self.views.tables[slots[row], number] = page
                part = kv[:, number * lay.page_tokens : (number + 1) * lay.page_tokens]
                self.pages[page, layer, :, : part.shape[1]] = part
            stored.append(kv.double())
        self.views.words[WORD_GROWTH] += 1
        return message, stored

    def wanted(self, stored: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of each row of a message by brute force, in float64."""
        lay = self.layout
        out = torch.zeros(len(stored), lay.heads, lay.dim, dtype=torch.float64)
        lse = torch.full((len(stored), lay.heads), -torch.inf, dtype=torch.float64)
        for row, kv in enumerate(stored):
            if kv.shape[1] == 0:
                continue
            q = self.queries[row].double() * self.scale
            for head in range(lay.heads):
                scores = kv[head // lay.group, :, 0] @ q[head]
                out[row, head] = torch.softmax(scores, 0) @ kv[head // lay.group, :, 1]
                lse[row, head] = torch.logsumexp(scores, 0)
        return out, lse

    def collect(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = np.full((rows, self.layout.heads, self.layout.dim), np.nan, np.float32)
        lse = np.full((rows, self.layout.heads), np.nan, np.float32)
        self.failed = self.client.collect(out, lse)
        return torch.from_numpy(out), torch.from_numpy(lse)

    def ask(self, layer: int, message: np.ndarray, probe: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        self.client.post(layer, message, probe)
        return self.collect(len(message))

    def check(self, layer: int, tokens: list[int], seed: int = 0, before_collect=lambda: None) -> None:
        """One message with random content, all of it exact, is answered right."""
        message, stored = self.fill(layer, tokens, seed)
        self.client.post(layer, message)
        before_collect()
        got, got_lse = self.collect(len(tokens))
        want, want_lse = self.wanted(stored)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-5, rtol=1e-5)

    def child_arguments(self, actor: int, spin_ns: int) -> list[str]:
        """Command line that serves an actor in a process of its own."""
        place = {"layout": asdict(self.layout), "actor": actor, "scale": self.scale, "spin": spin_ns}
        return [sys.executable, "-m", "tests.unit.lane_process", self.file.path, json.dumps(place)]
