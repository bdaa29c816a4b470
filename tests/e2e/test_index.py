"""The default index, live in the engine: the demo's questions, exact on request, and a worker that dies."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "found.json"
    command = [sys.executable, "-m", "tests.e2e.index_engine", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())


def test_the_demos_questions_are_answered_through_the_index(found):
    assert found["right"] == [True, True, True]
    assert found["indexed"] >= 4 + 4 + 6


def test_a_request_may_ask_for_exact_attention(found):
    assert found["exact_right"]


def test_the_index_outlives_a_worker_that_dies(found):
    assert found["restarted"]


def test_nothing_is_left(found):
    assert found["left"] == {"host_bytes": 0, "index_bytes": 0, "segments_waiting": 0}
