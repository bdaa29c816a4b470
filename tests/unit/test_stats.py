# SPDX-License-Identifier: Apache-2.0
"""What is told to vLLM's metrics: how it adds up over steps and ranks, and what a scrape shows of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_retrieval_attn.plugin import metric_names as names
from vllm_retrieval_attn.plugin import prometheus
from vllm_retrieval_attn.plugin.metric_names import key
from vllm_retrieval_attn.plugin.prometheus import RetrievalMetrics, count
from vllm_retrieval_attn.plugin.slow_steps import SlowSteps
from vllm_retrieval_attn.plugin.stats import MOST_ENDED, SCHEDULER, RetrievalStats


def of(rank, **more):
    return RetrievalStats.of(str(rank), {"host_tokens": 10 * rank, "healthy": 1.0}, more)


def test_steps_add_up_and_gauges_are_the_newest():
    told = RetrievalStats.of("0", {"host_tokens": 5}, {"rows_read": 7, "codes_scored": 0})
    assert told.data["more"] == {"0": {"rows_read": 7}}
    told.aggregate(RetrievalStats.of("0", {"host_tokens": 9}, {"rows_read": 1, key("steps", "degraded"): 2}))
    told.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [3.0]}))
    told.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [4.0]}))
    assert told.data["now"] == {"0": {"host_tokens": 9}}
    assert told.data["more"] == {"0": {"rows_read": 8, "steps|degraded": 2}}
    assert told.data["seen"] == {"request_host_tokens": [3.0, 4.0]}
    assert told.reduce() == {"host tokens": 9, "rows read": 8, "degraded steps": 2}
    assert RetrievalStats(json.loads(json.dumps(told.to_dict()))).data == told.data
    told.reset()
    assert told.is_empty()
    assert RetrievalStats().is_empty()


@pytest.fixture
def metrics(monkeypatch):
    """Metrics of two engines, and what a scrape finds."""
    registry = CollectorRegistry()
    knobs = SimpleNamespace(model_dump=lambda exclude: {"rows": 1024, "index": "attention"})
    monkeypatch.setattr(prometheus, "told", {})
    monkeypatch.setattr(prometheus, "resolved_config", lambda config: knobs)

    def kind(cls):
        def make(*, multiprocess_mode=None, **how):
            return cls(registry=registry, **how)

        return make

    made = RetrievalMetrics(
        SimpleNamespace(kv_transfer_config=None), {cls: kind(cls) for cls in (Gauge, Counter, Histogram)},
        ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]},
    )  # fmt: skip

    def scrape():
        lines = generate_latest(registry).decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    return made, scrape


def found(scrape, name, engine=0, **labels):
    """A value, whatever order its labels are in."""
    wanted = {f'{label}="{value}"' for label, value in {"engine": engine, "model_name": "m", **labels}.items()}
    for line, value in scrape.items():
        head, _, rest = line.partition("{")
        if head == f"vllm:retrieval_{name}" and set(rest.rstrip("}").split(",")) == wanted:
            return float(value)
    raise KeyError(name)


def test_a_scrape_shows_what_steps_told(metrics):
    made, scrape = metrics
    before = scrape()
    assert found(before, "rows_read_total") == found(before, "steps_total", path="faiss") == 0
    both = of(0, rows_read=5, **{"worker_restarts|died": 1}).aggregate(of(1, rows_read=7))
    both.aggregate(RetrievalStats.of("1", more={key("steps", "sketch"): 3}))
    both.aggregate(RetrievalStats.of("0", more={key("steps", "sketch"): 3}))
    both.aggregate(RetrievalStats.of("1", {"healthy": 0.0}))
    both.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [2000.0]}))
    made.observe(both.to_dict(), 1)
    made.observe(RetrievalStats.of("1", {"healthy": 1.0}, {"rows_read": 1}).to_dict(), 1)
    after = scrape()
    assert found(after, "rows_read_total", 1) == 13
    assert found(after, "steps_total", 1, path="sketch") == 3  # of an engine, not of a rank
    assert found(after, "worker_restarts_total", 1, reason="died") == 1
    assert found(after, "worker_restarts_total", 1, reason="asked") == 0
    assert found(after, "healthy", 1) == 1
    assert found(after, "host_tokens", 1) == 10
    assert found(after, "request_host_tokens_sum", 1) == 2000
    assert found(after, "rows_read_total", 0) == 0
    assert found(after, "config_info", rows="1024", index="attention") == 1


def test_one_sick_rank_makes_the_engine_sick(metrics):
    made, scrape = metrics
    made.observe(of(0).aggregate(of(1)).to_dict())
    assert found(scrape(), "healthy") == 1
    made.observe(RetrievalStats.of("1", {"healthy": 0.0}).to_dict())
    assert found(scrape(), "healthy") == 0


def test_parts_of_a_layer_are_observed_each(metrics):
    made, scrape = metrics
    assert found(scrape(), "layer_seconds_count", part="gather") == 0
    made.observe(
        RetrievalStats.of("0", seen={"layer_seconds|gather": [2e-5, 4e-5], "layer_seconds|score": [1e-5]}).data
    )
    after = scrape()
    assert found(after, "layer_seconds_count", part="gather") == 2
    assert found(after, "layer_seconds_sum", part="gather") == pytest.approx(6e-5)
    assert found(after, "layer_seconds_bucket", part="gather", le="2.5e-05") == 1
    assert found(after, "layer_seconds_count", part="write") == 0
    assert prometheus.told[0].parts == {"gather": 4e-5, "score": 1e-5}


def test_what_happens_in_the_api_server_is_counted_there(metrics):
    _, scrape = metrics
    count("requests_refused", "draining")
    count("requests_cut")
    after = scrape()
    assert found(after, "requests_refused_total", reason="draining") == found(after, "requests_cut_total") == 1
    assert found(after, "requests_refused_total", reason="arguments") == 0
    assert prometheus.told[0].total == {"requests_refused|draining": 1, "requests_cut": 1}


def test_lists_are_the_newest_and_of_ended_requests_the_last_thousand_stay(metrics):
    made, _ = metrics
    made.observe(
        RetrievalStats.of("0", lists={"workers": [1]}).aggregate(RetrievalStats.of("1", lists={"workers": [2]})).data
    )
    made.observe(RetrievalStats.of("0", lists={"workers": [3]}).data)
    made.observe(RetrievalStats.of(SCHEDULER, ended=[{"id": n} for n in range(MOST_ENDED + 5)]).data)
    told = prometheus.told[0]
    assert told.lists == {"0": {"workers": [3]}, "1": {"workers": [2]}}
    assert (told.ended[0], len(told.ended), told.count) == ({"id": 5}, MOST_ENDED, MOST_ENDED + 5)


def test_a_slow_step_is_told_with_its_parts_and_not_too_often(caplog):
    slow = SlowSteps()
    assert not any(slow.look({"search": 0.001}) for _ in range(30))
    assert not slow.look({"search": 0.0029})  # five times would be more, and it is not worth a line
    assert slow.look({"search": 0.03, "merge": 0.001})
    assert slow.look({"search": 0.03})
    (line,) = caplog.messages
    assert line == "retrieval: slow step: a layer took 31.00 ms, usual are 1.06 (search 30.00, merge 1.00)"
    assert not SlowSteps().look({"search": 5.0})  # nothing is usual yet


def test_every_metric_has_a_text_and_a_rule():
    assert set(names.HISTOGRAMS) == set(names.BUCKETS)
    for metric in {**names.GAUGES, **names.COUNTERS, **names.HISTOGRAMS}.values():
        assert metric.text.endswith(".")
        assert metric.over([1.0, 2.0]) in (1.0, 2.0, 3.0)


def test_the_docs_list_every_metric_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
    listed = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            listed |= set(re.findall(r"`([a-z_]+?)(?:_total)?(?:\{\w+\})?`", line.split("|")[1]))
    assert listed == {*names.GAUGES, *names.COUNTERS, *names.HISTOGRAMS, "config_info"}
