# SPDX-License-Identifier: Apache-2.0
"""What the log says, and how its levels are set: docs/operate.md, "Logs"."""

import json
import logging
import logging.config
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.plugin.request_log import RequestLog

ROOT = Path(__file__).parents[2]


def request(name, computed=3000):
    return SimpleNamespace(
        request_id=name, arrival_time=0.0, num_prompt_tokens=2990, num_output_tokens=11, num_computed_tokens=computed,
        status=RequestStatus.FINISHED_LENGTH_CAPPED,
    )  # fmt: skip


@pytest.fixture
def log():
    split = Split(128, 512, 1024, 16)
    config = SimpleNamespace(split=split, sink_end=128, index="attention")
    return RequestLog(config, SimpleNamespace(pages=10, needs_host=lambda name: True), 0)


def test_a_request_that_ended_is_a_line_at_debug_and_none_at_info(log, caplog):
    for level in (logging.INFO, logging.DEBUG):
        caplog.set_level(level, "vllm.retrieval.requests")
        log.arrived(one := request(f"at {level}"))
        log.ended(one, ([0, 1, 2],))
    (line,) = caplog.messages
    assert line.startswith("retrieval: request at 10 ended (length) after ")
    assert "prompt_tokens=2990" in line
    assert "path=paged" in line
    assert "host_tokens=2352" in line


def test_what_is_told_of_requests_waits_unless_one_has_come_or_gone(log):
    assert log.take_stats() == {}
    log.arrived(one := request("a", computed=0))
    told = log.take_stats()
    assert [row["id"] for row in told["lists"]["requests"]] == ["a"]
    assert told["now"] == {"paged_tokens": 0.0}
    assert log.take_stats() == {}
    log.ended(one, ([0],))
    told = log.take_stats()
    assert told["lists"]["requests"] == []
    assert [row["finish"] for row in told["ended"]] == ["length"]
    assert log.take_stats() == {}


def test_levels_are_set_by_logger_as_the_docs_show(capsys):
    text = (ROOT / "docs" / "operate.md").read_text()
    config = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))
    names = set(re.findall(r"^\| `(vllm\.retrieval[.\w]*)`", text, re.MULTILINE))
    used = set()
    for file in (ROOT / "vllm_retrieval_attn").rglob("*.py"):
        used |= set(re.findall(r'getLogger\("(vllm\.retrieval[.\w]*)"\)', file.read_text()))
    assert used == names
    before = {name: logging.getLogger(name) for name in ("vllm", "vllm.retrieval.requests")}
    kept = {name: (one.level, one.handlers[:], one.propagate) for name, one in before.items()}
    try:
        logging.config.dictConfig(config)
        logging.getLogger("vllm.retrieval.requests").debug("retrieval: shown")
        logging.getLogger("vllm.retrieval.workers").debug("retrieval: hidden")
        said = capsys.readouterr().err
        assert "retrieval: shown" in said
        assert "hidden" not in said
    finally:
        for name, (level, handlers, propagate) in kept.items():
            before[name].setLevel(level)
            before[name].handlers, before[name].propagate = handlers, propagate


def test_every_line_begins_alike():
    """Format strings of loggers and errors for users, where they are given as text."""
    for file in (ROOT / "vllm_retrieval_attn").rglob("*.py"):
        for said in re.findall(r'logger\.\w+\(\s*f?"([^"]*)"', file.read_text()):
            assert said.startswith("retrieval: "), (file.name, said)
