# SPDX-License-Identifier: Apache-2.0
"""What a vLLM worker tells of itself with its steps (plugin/stats.py): gauges now and then, counters as they grow."""

import time
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.plugin.metric_names import RESTARTS, key
from vllm_retrieval_attn.plugin.slow_steps import SlowSteps
from vllm_retrieval_attn.plugin.stats import RetrievalStats
from vllm_retrieval_attn.store.layout import ROW_INDEXED

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker

_FAILED = key("requests_failed", "search")
EVERY_S = 0.5
"""Gauges are told so often, or when a request has come or gone: a decode step takes 10 ms."""


class WorkerStats:
    """Collects what happens in steps until it is told.

    Args:
        worker: whose. rank: of the worker.
    """

    def __init__(self, worker: "RetrievalWorker", rank: int) -> None:
        self._worker, self._source = worker, str(rank)
        self._more: dict[str, float] = {}
        self._told, self._requests = 0.0, -1
        self._before: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._slow = SlowSteps()

    def count(self, name: str, value: float) -> None:
        """A counter grew."""
        self._more[name] = self._more.get(name, 0) + value

    def layer(self, parts: dict[str, float]) -> None:
        """Seconds of each part of a layer in a step of decoding requests, mean of its layers."""
        self._parts = parts
        self._slow.look(parts)

    def step(self, plan: "StepPlan | None") -> None:
        """A step is over. plan: what it had to do on the host; None where there was no forward pass."""
        if plan is None:
            return
        self.count(key("steps", self._path(plan)), 1)
        layout = self._worker.arena.layout
        scored = int(plan.decode_rows[:, ROW_INDEXED].sum()) if plan.searched and not plan.attends_here else 0
        if plan.sketch is not None:
            scored += sum(row.tokens for row in plan.sketch.rows if row.tokens > row.limit)
        self.count("codes_scored", scored * layout.kv_heads * layout.layers)

    def _path(self, plan: "StepPlan") -> str:
        if plan.attends_here:
            return "degraded"
        if plan.searched:
            return "faiss" if plan.decode_rows[:, ROW_INDEXED].any() else "exact"
        return "sketch" if plan.sketch is not None and plan.sketch.attends else "paged"

    def take(self) -> RetrievalStats | None:
        """What there is to tell; None if it can wait."""
        now, live = time.time(), len(self._worker.arena.requests)
        if now - self._told < EVERY_S and live == self._requests and not self._more.get(_FAILED):
            return None
        self._told, self._requests = now, live
        probes = self._worker.sampler.probes if self._worker.sampler is not None else 0
        restarts = self._worker.pool.restarts
        ever = {key("worker_restarts", reason): restarts[reason] for reason in RESTARTS}
        for name, value in {**ever, "compared_steps": probes}.items():
            self.count(name, value - self._before.get(name, 0))
            self._before[name] = value
        more, self._more = self._more, {}
        seen = {key("layer_seconds", part): [seconds] for part, seconds in self._parts.items()}
        self._parts = {}
        lists = {"workers": self._workers()}
        return RetrievalStats.of(self._source, self._gauges(now), more, seen, lists)

    def _workers(self) -> list[dict[str, Any]]:
        pool = self._worker.pool
        silent, found = pool.silent(), []
        for number, pid in enumerate(pool.pids()):
            state = "absent" if not pool.lives(pid) else "silent" if number in silent else "alive"
            found.append({"number": number, "pid": pid, "state": state})
        return found

    def _gauges(self, now: float) -> dict[str, float]:
        worker, layout = self._worker, self._worker.arena.layout
        alive = sum(map(worker.pool.lives, worker.pool.pids()))
        capacity = worker.arena.capacity_bytes
        gauges = {
            "healthy": float(alive == layout.actors), key("workers", "wanted"): layout.actors,
            key("workers", "alive"): alive, key("workers", "silent"): len(worker.pool.silent()),
            "workers_given_up": float(worker.pool.gave_up),
            key("arena_bytes", "used"): worker.arena.used_bytes, key("arena_bytes", "capacity"): capacity,
            "arena_usage_ratio": worker.arena.used_bytes / max(1, capacity),
            "host_tokens": worker.arena.host_tokens, "host_requests": len(worker.arena.requests),
            "sample_timestamp_seconds": now,
        }  # fmt: skip
        if worker.sketch is not None:
            codes, size = worker.sketch.codes, worker.sketch.geometry.sketch_page_bytes
            used = worker.arena.used_codes()
            gauges |= {
                key("sketch_bytes", "used"): used * size, key("sketch_bytes", "capacity"): codes.pages * size,
                "sketch_usage_ratio": used / max(1, codes.pages),
            }  # fmt: skip
        figures = worker.sampler.figures() if worker.sampler is not None else {}
        for layers, of in figures.items():
            gauges |= {key(name, layers.removeprefix("layers ")): value for name, value in of.items()}
        return gauges
