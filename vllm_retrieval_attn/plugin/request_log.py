# SPDX-License-Identifier: Apache-2.0
"""Requests as the scheduler half sees them: those that live, with what each holds, and how each ended."""

import logging
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.plugin.messages import WorkerReport

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_retrieval_attn.core.config import ResolvedConfig
    from vllm_retrieval_attn.core.ledger import HostLedger

EVERY_S = 0.5
"""Live requests are told of so often, or when one has come or gone."""
MOST_LIVE = 1000
"""That many are listed; all are counted."""

_NULL_BLOCK = 0

logger = logging.getLogger("vllm.retrieval.requests")


class RequestLog:
    """Kept by the scheduler half.

    Args:
        config, ledger: of the engine. group: number of the KV cache group that is ours.
    """

    def __init__(self, config: "ResolvedConfig", ledger: "HostLedger", group: int) -> None:
        self._config, self._ledger, self._group = config, ledger, group
        self._live: dict[str, Request] = {}
        self._options: dict[str, SearchOptions] = {}
        self._cached: dict[str, int] = {}
        self._read: dict[str, tuple[int, int]] = {}
        self._sketched: set[str] = set()
        self._degraded: Counter[str] = Counter()
        self._seen: dict[str, list[float]] = {}
        self._ended: list[dict[str, Any]] = []
        self._changed, self._told = False, 0.0

    def arrived(self, request: "Request") -> None:
        self._live[request.request_id] = request
        self._changed = True

    def admitted(self, name: str, options: SearchOptions, cached: int | None) -> None:
        """``cached``: tokens that need not be computed; None where a session goes on."""
        before = self._options.get(name, options)
        self._options[name] = replace(options, exact=options.exact and before.exact)  # so it tells of every chunk
        if cached is not None:
            self._cached[name] = cached

    def note(self, report: WorkerReport) -> None:
        """Take in what the workers tell of a step; of requests that ended meanwhile nothing."""
        for name, (rows, searches) in report.read.items():
            if name not in self._options:
                continue
            sums = self._read.get(name, (0, 0))
            self._read[name] = sums[0] + rows, sums[1] + searches
            if name in report.sketched:
                self._sketched.add(name)
        self._degraded.update(report.degraded & self._options.keys())

    def _host_tokens(self, request: "Request") -> int:
        left_pages = self._config.split.window_start(request.num_computed_tokens) - self._config.sink_end
        hosted = self._ledger.pages > 0 and self._ledger.needs_host(request.request_id)
        return left_pages if hosted else 0

    def _paged_tokens(self, request: "Request") -> int:
        computed = request.num_computed_tokens
        return computed - (self._config.split.window_start(computed) - self._config.sink_end)

    def ended(self, request: "Request", block_ids: tuple[list[int], ...]) -> dict[str, Any]:
        """What the request held, for the response's ``kv_transfer_params``; it lives no more."""
        name, host = request.request_id, self._host_tokens(request)
        report = {
            "prompt_tokens": request.num_prompt_tokens,
            "paged_blocks": sum(block != _NULL_BLOCK for block in block_ids[self._group]),
            "paged_tokens": self._paged_tokens(request),
            "host_tokens": host,
            "cached_tokens": self._cached.pop(name, 0),
            "path": "paged",
            "rows_read": 0,
            "degraded_steps": self._degraded.pop(name, 0),
        }
        rows, searches = self._read.pop(name, (0, 0))
        options = self._options.pop(name, None)
        if searches:
            exact = self._config.index == "flat" or (options is not None and options.exact)
            path = "sketch" if name in self._sketched else "exact" if exact else "faiss"
            report |= {"path": path, "rows_read": round(rows / searches)}
            self._seen.setdefault("request_rows_read", []).append(rows / searches)
        self._seen.setdefault("request_host_tokens", []).append(host)
        self._sketched.discard(name)
        self._live.pop(name, None)
        reason = RequestStatus.get_finished_reason(request.status)
        over = {
            "id": name, "finish": "unknown" if reason is None else str(reason), "arrived": request.arrival_time,
            "seconds": round(time.time() - request.arrival_time, 3), "output_tokens": request.num_output_tokens,
            **report,
        }  # fmt: skip
        self._ended.append(over)
        self._changed = True
        logger.debug(
            "retrieval: request %s ended (%s) after %.1f s: %s", name, over["finish"], over["seconds"],
            " ".join(f"{what}={value}" for what, value in over.items() if what not in ("id", "finish", "seconds")),
        )  # fmt: skip
        return report

    def take_stats(self) -> dict[str, Any]:
        """Arguments of RetrievalStats.of; empty if it can wait."""
        now = time.monotonic()
        if not self._changed and (now - self._told < EVERY_S or not self._live):
            return {}
        self._changed, self._told = False, now
        seen, self._seen = self._seen, {}
        ended, self._ended = self._ended, []
        gauges = {"paged_tokens": float(sum(map(self._paged_tokens, self._live.values())))}
        live = [self._row(request) for request in list(self._live.values())[:MOST_LIVE]]
        return {"now": gauges, "seen": seen, "lists": {"requests": live}, "ended": ended}

    def _row(self, request: "Request") -> dict[str, Any]:
        return {
            "id": request.request_id, "state": request.status.name.lower(), "arrived": request.arrival_time,
            "prompt_tokens": request.num_prompt_tokens, "output_tokens": request.num_output_tokens,
            "host_tokens": self._host_tokens(request),
            "paged_tokens": self._paged_tokens(request), "cached_tokens": self._cached.get(request.request_id, 0),
        }  # fmt: skip
