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
    return tokens(tmp_path_factory, "CPU_ATTN", "2048", "together")


def test_eight_at_once_in_chunks_of_2048(full_attention, tmp_path_factory):
    assert tokens(tmp_path_factory, "retrieval", "2048", "together") == full_attention


def test_alone_in_chunks_of_256(full_attention, tmp_path_factory):
    assert tokens(tmp_path_factory, "retrieval", "256", "alone") == full_attention[:4]
