# SPDX-License-Identifier: Apache-2.0
"""Alert rules and the dashboard: every expression parses, and names metrics that a server tells."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from vllm_retrieval_attn.plugin import metric_names as names

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
VLLMS = {"vllm:num_requests_running", "vllm:inter_token_latency_seconds_bucket"}


def alerts():
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return [rule for group in rules["groups"] for rule in group["rules"]]


def dashboard():
    """All expressions, with Grafana's variables filled in."""
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [expression.replace("$__rate_interval", "5m") for expression in found]


def told():
    """Names of all that a scrape shows, with the endings that Prometheus' client gives them."""
    found = {*names.GAUGES, *(f"{name}_total" for name in names.COUNTERS), "config_info"}
    found |= {f"{name}_{ending}" for name in names.HISTOGRAMS for ending in ("bucket", "sum", "count")}
    return {f"vllm:retrieval_{name}" for name in found}


EXPRESSIONS = [rule["expr"] for rule in alerts()] + dashboard()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_parses_and_names_what_is_told(expression):
    promql_parser.parse(expression)
    metrics = set(re.findall(r"vllm:\w+", expression))
    assert metrics
    assert metrics <= told() | VLLMS


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_labels_and_their_values_are_those_of_the_metrics(expression):
    tables = {**names.GAUGES, **names.COUNTERS, **names.HISTOGRAMS}
    for metric, matchers in re.findall(r"vllm:retrieval_(\w+)\{([^}]*)\}", expression):
        name = metric if metric in tables else re.sub(r"_(total|bucket|sum|count)$", "", metric)
        for label, value in re.findall(r'(\w+)!?=~?"([^"]*)"', matchers):
            if label not in ("model_name", "engine"):
                assert label == tables[name].label
                assert value in tables[name].values


def test_all_that_is_told_is_on_the_dashboard():
    shown = set(re.findall(r"vllm:retrieval_\w+", " ".join(dashboard())))
    endings = re.compile(r"_(bucket|sum|count)$")
    assert {endings.sub("", name) for name in shown} == {endings.sub("", name) for name in told()}


def test_every_alert_says_what_to_do_and_the_docs_list_it():
    docs = (FOLDER.parents[1] / "docs" / "operate.md").read_text()
    assert {rule["alert"] for rule in alerts()} == set(re.findall(r"^\| `(Retrieval\w+)`", docs, re.MULTILINE))
    for rule in alerts():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert len(rule["annotations"]["description"]) > 40


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_each_alert_is_raised_by_what_it_is_for():
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
