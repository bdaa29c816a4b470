# SPDX-License-Identifier: Apache-2.0
"""What workers and the scheduler half of the connector tell the API server's process.

They hand a :class:`RetrievalStats` to vLLM with a step; it travels to the API server's process, where
plugin/prometheus.py takes it in. Without steps nothing is told, so a gauge says how things were at
``retrieval_sample_timestamp_seconds``.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from vllm_retrieval_attn.plugin.metric_names import COUNTERS, GAUGES, Metric, key

SCHEDULER = "scheduler"
"""Source of what the scheduler half tells; a worker's is its rank."""
MOST_ENDED = 1000
"""Requests that are over and still told of."""


class RetrievalStats(KVConnectorStats):
    """``data``: ``now``, gauges by source and key; ``more``, what counters grew by, likewise; ``seen``, observations of
    histograms by key; ``lists``, what there is at present by source and name; ``ended``, requests that are over."""

    @classmethod
    def of(
        cls,
        source: str,
        now: dict[str, float] | None = None,
        more: dict[str, float] | None = None,
        seen: dict[str, list[float]] | None = None,
        lists: dict[str, list[Any]] | None = None,
        ended: list[dict[str, Any]] | None = None,
    ) -> "RetrievalStats":
        grown = {name: value for name, value in (more or {}).items() if value}
        return cls(
            {
                "now": {source: now} if now else {}, "more": {source: grown} if grown else {}, "seen": seen or {},
                "lists": {source: lists} if lists else {}, "ended": ended or [],
            }
        )  # fmt: skip

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or self._empty())

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"now": {}, "more": {}, "seen": {}, "lists": {}, "ended": []}

    def reset(self) -> None:
        self.data = self._empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for part in ("now", "lists"):
            for source, values in other.data[part].items():
                self.data[part].setdefault(source, {}).update(values)
        for source, values in other.data["more"].items():
            mine = self.data["more"].setdefault(source, {})
            for name, value in values.items():
                mine[name] = mine.get(name, 0) + value
        for name, values in other.data["seen"].items():
            self.data["seen"].setdefault(name, []).extend(values)
        self.data["ended"].extend(other.data["ended"])
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's line in the log."""
        now, more = over(self.data["now"], GAUGES), over(self.data["more"], COUNTERS)
        line: dict[str, int | float] = {
            "host tokens": int(now.get("host_tokens", 0)), "rows read": int(more.get("rows_read", 0)),
            "degraded steps": int(more.get(key("steps", "degraded"), 0)),
        }  # fmt: skip
        return line


def over(sources: dict[str, dict[str, float]], metrics: dict[str, Metric]) -> dict[str, float]:
    """One value of each key, over all sources that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for values in sources.values():
        for name, value in values.items():
            found[name].append(value)
    return {name: metrics[name.partition("|")[0]].over(values) for name, values in found.items()}


@dataclass
class Told:
    """What one engine has told this API server.

    Attributes:
        now: newest gauges. total: counters since the server's start. Names as in the metrics, without their prefix.
        parts: newest observation of each part of a layer, in seconds.
        lists: by source and name, newest. ended: requests that are over, newest last; count: how many ever.
    """

    now: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    lists: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    ended: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_ENDED))
    count: int = 0

    def take(self, data: dict[str, Any]) -> None:
        """Lists and ended requests of a RetrievalStats."""
        for source, lists in data["lists"].items():
            self.lists.setdefault(source, {}).update(lists)
        self.ended.extend(data["ended"])
        self.count += len(data["ended"])


told: dict[int, Told] = {}
"""By engine; for the routes (serving/), which share the API server's process with the metrics."""
