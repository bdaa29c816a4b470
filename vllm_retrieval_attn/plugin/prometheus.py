# SPDX-License-Identifier: Apache-2.0
"""This backend's metrics on vLLM's own ``/metrics``, as ``vllm:retrieval_*``, in an API server's process."""

from collections import defaultdict
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from vllm_retrieval_attn.plugin.metric_names import BUCKETS, COUNTERS, GAUGES, HISTOGRAMS, key
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.plugin.stats import Told, over, told

_here: "RetrievalMetrics | None" = None


def count(name: str, label: str = "") -> None:
    """Something happened in this API server's process, of which no engine knows."""
    if _here is not None:  # None with --disable-log-stats
        _here.add(key(name, label), 1, min(_here.per_engine_labelvalues))


class RetrievalMetrics(KVConnectorPromMetrics):
    """The metrics of an API server's process; arguments are vLLM's."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: dict[int, Any]) -> None:
        global _here
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        gauge: Any = self._gauge_cls
        counter: Any = self._counter_cls
        histogram: Any = self._histogram_cls
        self._sources: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        self._made: dict[str, Any] = {}
        for name, metric in {**GAUGES, **COUNTERS, **HISTOGRAMS}.items():
            kind: Any = counter
            more: dict[str, Any] = {}
            if name in GAUGES:
                kind, more = gauge, {"multiprocess_mode": "mostrecent"}
            elif name in HISTOGRAMS:
                kind, more = histogram, {"buckets": BUCKETS[name]}
            self._made[name] = kind(
                name=f"vllm:retrieval_{name}",
                documentation=metric.text,
                labelnames=[*labelnames, *([metric.label] if metric.label else [])],
                **more,
            )
        knobs = resolved_config(vllm_config).model_dump(exclude={"cpus"})
        labels = {name: str(value) for name, value in knobs.items()}
        info = gauge(
            name="vllm:retrieval_config_info", documentation="Knobs of the retrieval backend; always 1.",
            labelnames=[*labelnames, *labels], multiprocess_mode="mostrecent",
        )  # fmt: skip
        for engine, values in per_engine.items():
            info.labels(*values, *labels.values()).set(1)
            for name, metric in {**COUNTERS, **HISTOGRAMS}.items():
                for label in metric.values or ("",):
                    self._child(key(name, label), engine)  # so that it is there, at 0
        _here = self

    def _child(self, name: str, engine: int) -> Any:
        name, _, label = name.partition("|")
        return self._made[name].labels(*self.per_engine_labelvalues[engine], *([label] if label else []))

    def add(self, name: str, value: float, engine: int) -> None:
        """A counter grew; its name as of :func:`key`."""
        self._child(name, engine).inc(value)
        total = told.setdefault(engine, Told()).total
        total[name] = total.get(name, 0) + value

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        sources, mine = self._sources[engine_idx], told.setdefault(engine_idx, Told())
        for source, values in transfer_stats_data["now"].items():
            sources.setdefault(source, {}).update(values)
        if transfer_stats_data["now"]:
            for name, value in over(sources, GAUGES).items():
                self._child(name, engine_idx).set(value)
                mine.now[name] = value
        for name, value in over(transfer_stats_data["more"], COUNTERS).items():
            self.add(name, value, engine_idx)
        for name, values in transfer_stats_data["seen"].items():
            for value in values:
                self._child(name, engine_idx).observe(value)
            metric, _, label = name.partition("|")
            if metric == "layer_seconds":
                mine.parts[label] = values[-1]
        mine.take(transfer_stats_data)
