"""What is told to vLLM's metrics: how it adds up over steps and ranks, and what a scrape shows of it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_retrieval_attn.plugin import stats as module
from vllm_retrieval_attn.plugin.stats import SCHEDULER, RetrievalMetrics, RetrievalStats, key


def of(rank, **more):
    return RetrievalStats.of(str(rank), {"host_tokens": 10 * rank, "healthy": 1.0}, more)


def test_steps_add_up_and_gauges_are_the_newest():
    stats = RetrievalStats.of("0", {"host_tokens": 5}, {"rows_read": 7, "worker_restarts": 0})
    assert stats.data["more"] == {"0": {"rows_read": 7}}
    stats.aggregate(RetrievalStats.of("0", {"host_tokens": 9}, {"rows_read": 1, key("steps", "degraded"): 2}))
    stats.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [3.0]}))
    stats.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [4.0]}))
    assert stats.data["now"] == {"0": {"host_tokens": 9}}
    assert stats.data["more"] == {"0": {"rows_read": 8, "steps|degraded": 2}}
    assert stats.data["seen"] == {"request_host_tokens": [3.0, 4.0]}
    assert stats.reduce() == {"host tokens": 9, "rows read": 8, "degraded steps": 2}
    assert RetrievalStats(json.loads(json.dumps(stats.to_dict()))).data == stats.data
    stats.reset()
    assert stats.is_empty()
    assert RetrievalStats().is_empty()


@pytest.fixture
def metrics(monkeypatch):
    """Metrics of two engines, and what a scrape finds."""
    registry = CollectorRegistry()
    knobs = SimpleNamespace(model_dump=lambda exclude: {"rows": 1024, "index": "attention"})
    monkeypatch.setattr(module, "resolved_config", lambda config: knobs)

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
    both = of(0, rows_read=5, worker_restarts=1).aggregate(of(1, rows_read=7))
    both.aggregate(RetrievalStats.of("1", more={key("steps", "sketch"): 3}))
    both.aggregate(RetrievalStats.of("0", more={key("steps", "sketch"): 3}))
    both.aggregate(RetrievalStats.of("1", {"healthy": 0.0}))
    both.aggregate(RetrievalStats.of(SCHEDULER, seen={"request_host_tokens": [2000.0]}))
    made.observe(both.to_dict(), 1)
    made.observe(RetrievalStats.of("1", {"healthy": 1.0}, {"rows_read": 1}).to_dict(), 1)
    after = scrape()
    assert found(after, "rows_read_total", 1) == 13
    assert found(after, "steps_total", 1, path="sketch") == 3  # of an engine, not of a rank
    assert found(after, "worker_restarts_total", 1) == 1
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


def test_every_metric_has_a_text_and_a_rule():
    assert set(module.HISTOGRAMS) == set(module._BUCKETS)
    for metric in {**module.GAUGES, **module.COUNTERS, **module.HISTOGRAMS}.values():
        assert metric.text.endswith(".")
        assert metric.over([1.0, 2.0]) in (1.0, 2.0, 3.0)


def test_the_docs_list_every_metric_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
    names = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`(\w+?)(?:_total)?(?:\{\w+\})?`", line.split("|")[1]))
    assert names == {*module.GAUGES, *module.COUNTERS, *module.HISTOGRAMS, "config_info"}
