"""What this backend tells vLLM's own ``/metrics``, as ``vllm:retrieval_*``.

Workers and the scheduler half of the connector hand a :class:`RetrievalStats` to vLLM with a step; it travels to the
API server's process, where :class:`RetrievalMetrics` sets gauges and adds to counters. Without steps nothing is told,
so a gauge says how things were at ``retrieval_sample_timestamp_seconds``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_retrieval_attn.plugin.resolved import resolved_config

SCHEDULER = "scheduler"
"""Source of what the scheduler half tells; a worker's is its rank."""


class Metric(NamedTuple):
    """One of vLLM's metrics. ``over``: how values of several ranks become one. ``label``: of its own, or none."""

    text: str
    label: str = ""
    over: Callable[[Iterable[float]], float] = sum


GAUGES = {
    "healthy": Metric(
        "1 while every CPU worker lives, 0 while the engine attends to host memory without them.", over=min
    ),
    "workers": Metric("CPU workers, by state: wanted, alive.", "state"),
    "workers_given_up": Metric("1 once CPU workers died so often that they are not started again.", over=max),
    "arena_bytes": Metric("Host memory for K and V, by kind: used, capacity.", "kind"),
    "arena_usage_ratio": Metric(
        "Used share of the host memory for K and V, of the rank that has least left.", over=max
    ),
    "sketch_bytes": Metric("GPU memory for codes of host keys, by kind: used, capacity.", "kind"),
    "sketch_usage_ratio": Metric("Used share of the GPU memory for codes, of the rank that has least left.", over=max),
    "host_tokens": Metric("Tokens of live requests that host memory holds.", over=max),
    "host_requests": Metric("Live requests that hold host memory.", over=max),
    "prefix_pages": Metric("Host pages kept for their prefix, by use: shared by live requests, idle.", "use"),
    "prefix_bytes": Metric("Host memory that these take."),
    "recall": Metric("Recall@100 of the rows read, running mean of compared steps.", "layers", min),
    "mass": Metric("Share of the attention that the rows read carry, likewise.", "layers", min),
    "output_error": Metric("Relative error of a layer's output against exact attention, likewise.", "layers", max),
    "lse_bias": Metric("Signed error of the log-sum-exp, likewise; the estimate is unbiased at 0.", "layers", max),
    "sample_timestamp_seconds": Metric("When the newest of these samples was taken, in seconds since 1970.", over=max),
}
COUNTERS = {
    "steps": Metric(
        "Engine steps by how they attended to host tokens of decoding requests: sketch, faiss, exact, degraded (by the "
        "engine itself, CPU workers being late or gone), none.",
        "path",
        max,
    ),
    "rows_read": Metric("Host rows read in decode steps, summed over layers and KV heads."),
    "codes_scored": Metric("Codes scored in decode steps, summed over layers and KV heads."),
    "worker_restarts": Metric("Restarts of CPU workers and of their supervisor."),
    "requests_failed": Metric("Requests that ended with an error of this backend.", over=max),
    "prefix_hits": Metric("Requests that began with what was kept of their prompt."),
    "prefix_hit_tokens": Metric("Prompt tokens that need not be computed for that."),
    "prefix_evicted_pages": Metric("Kept host pages that were dropped, as their memory was wanted."),
    "compared_steps": Metric("Decode steps compared with exact attention.", over=max),
}
HISTOGRAMS = {
    "request_host_tokens": Metric("Host tokens of finished requests."),
    "request_rows_read": Metric("Host rows read in a decode step, mean of a request that read any."),
}
_BUCKETS = {
    "request_host_tokens": [0, *(1 << n for n in range(10, 21))],
    "request_rows_read": [16, *(1 << n for n in range(5, 17))],
}


def key(name: str, label: str = "") -> str:
    """A metric's value with its own label, as the stats carry it."""
    return f"{name}|{label}" if label else name


class RetrievalStats(KVConnectorStats):
    """``data``: ``now``, gauges by source and key; ``more``, what counters grew by, likewise; ``seen``, observations of
    histograms by name."""

    @classmethod
    def of(
        cls,
        source: str,
        now: dict[str, float] | None = None,
        more: dict[str, float] | None = None,
        seen: dict[str, list[float]] | None = None,
    ) -> "RetrievalStats":
        grown = {name: value for name, value in (more or {}).items() if value}
        return cls({"now": {source: now} if now else {}, "more": {source: grown} if grown else {}, "seen": seen or {}})

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {"now": {}, "more": {}, "seen": {}})

    def reset(self) -> None:
        self.data = {"now": {}, "more": {}, "seen": {}}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for source, values in other.data["now"].items():
            self.data["now"].setdefault(source, {}).update(values)
        for source, values in other.data["more"].items():
            mine = self.data["more"].setdefault(source, {})
            for name, value in values.items():
                mine[name] = mine.get(name, 0) + value
        for name, values in other.data["seen"].items():
            self.data["seen"].setdefault(name, []).extend(values)
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's line in the log."""
        now, more = _over(self.data["now"], GAUGES), _over(self.data["more"], COUNTERS)
        line: dict[str, int | float] = {
            "host tokens": int(now.get("host_tokens", 0)), "rows read": int(more.get("rows_read", 0)),
            "degraded steps": int(more.get(key("steps", "degraded"), 0)),
        }  # fmt: skip
        return line


def _over(sources: dict[str, dict[str, float]], metrics: dict[str, Metric]) -> dict[str, float]:
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
    """

    now: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)


told: dict[int, Told] = {}
"""By engine; for the routes (serving/), which share the API server's process with the metrics."""


class RetrievalMetrics(KVConnectorPromMetrics):
    """The metrics of an API server's process; arguments are vLLM's."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: dict[int, Any]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        gauge: Any = self._gauge_cls
        counter: Any = self._counter_cls
        histogram: Any = self._histogram_cls
        self._sources: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        self._made: dict[str, Any] = {}
        for name, metric in {**GAUGES, **COUNTERS}.items():
            kind, more = (gauge, {"multiprocess_mode": "mostrecent"}) if name in GAUGES else (counter, {})
            self._made[name] = kind(
                name=f"vllm:retrieval_{name}",
                documentation=metric.text,
                labelnames=[*labelnames, *([metric.label] if metric.label else [])],
                **more,
            )
        for name, metric in HISTOGRAMS.items():
            self._made[name] = histogram(
                name=f"vllm:retrieval_{name}", documentation=metric.text, labelnames=labelnames, buckets=_BUCKETS[name]
            )
        knobs = resolved_config(vllm_config).model_dump(exclude={"cpus"})
        labels = {name: str(value) for name, value in knobs.items()}
        info = gauge(
            name="vllm:retrieval_config_info", documentation="Knobs of the retrieval backend; always 1.",
            labelnames=[*labelnames, *labels], multiprocess_mode="mostrecent",
        )  # fmt: skip
        for values in per_engine.values():
            info.labels(*values, *labels.values()).set(1)
            for path in ("sketch", "faiss", "exact", "degraded", "none"):
                self._made["steps"].labels(*values, path)
            for name in ("rows_read", "codes_scored", "worker_restarts", "requests_failed", "compared_steps",
                         "prefix_hits", "prefix_hit_tokens", "prefix_evicted_pages"):  # fmt: skip
                self._made[name].labels(*values)

    def _child(self, name: str, engine: int) -> Any:
        name, _, label = name.partition("|")
        return self._made[name].labels(*self.per_engine_labelvalues[engine], *([label] if label else []))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        sources, mine = self._sources[engine_idx], told.setdefault(engine_idx, Told())
        for source, values in transfer_stats_data["now"].items():
            sources.setdefault(source, {}).update(values)
        if transfer_stats_data["now"]:
            for name, value in _over(sources, GAUGES).items():
                self._child(name, engine_idx).set(value)
                mine.now[name] = value
        for name, value in _over(transfer_stats_data["more"], COUNTERS).items():
            self._child(name, engine_idx).inc(value)
            mine.total[name] = mine.total.get(name, 0) + value
        for name, values in transfer_stats_data["seen"].items():
            for value in values:
                self._child(name, engine_idx).observe(value)
