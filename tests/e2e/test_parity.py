"""`flat` gives the greedy tokens of vLLM's own CPU backend, in float32."""

import json
import subprocess
import sys

import pytest


def tokens(tmp_path_factory, *arguments):
    out = tmp_path_factory.mktemp("parity") / "tokens.json"
    command = [sys.executable, "-m", "tests.e2e.parity", str(out), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def full_attention(tmp_path_factory):
    """Eight prompts at once: 100, 700, 3,000 and 7,500 tokens, and four shorter ones; 64 tokens each."""
    return tokens(tmp_path_factory, "CPU_ATTN", "2048")["together"]


@pytest.mark.parametrize("chunk", ["256", "2048"])
def test_eight_at_once_and_alone(full_attention, tmp_path_factory, chunk):
    got = tokens(tmp_path_factory, "retrieval", chunk)
    assert got["together"] == full_attention
    assert got["alone"] == full_attention[: len(got["alone"])]
    assert len(got["alone"]) >= 3
