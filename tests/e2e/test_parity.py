# SPDX-License-Identifier: Apache-2.0
"""`flat` gives the greedy tokens of vLLM's own CPU backend, in float32."""

import pytest

from tests.e2e.test_families import TOLERANCE, gap
from tests.engines import EngineRun


def engine_runs(folder):
    runs = {}
    for backend, chunk, seconds in (("CPU_ATTN", "2048", 100), ("retrieval", "256", 180), ("retrieval", "2048", 250)):
        out = folder / f"parity-{backend}-{chunk}.json"
        arguments = (str(out), backend, chunk)
        runs[f"parity {backend} {chunk}"] = EngineRun(seconds, out, "tests.e2e.parity", arguments)
    return runs


@pytest.fixture(scope="module")
def full_attention(engine_run):
    """Eight prompts at once: 100, 700, 3,000 and 7,500 tokens, and four shorter ones; 64 tokens each."""
    return engine_run("parity CPU_ATTN 2048")["together"]


@pytest.mark.parametrize("chunk", ["256", "2048"])
def test_eight_at_once_and_alone(full_attention, engine_run, chunk):
    got = engine_run(f"parity retrieval {chunk}")
    assert len(got["together"]["tokens"]) == len(full_attention["tokens"]) == 8
    assert len(got["alone"]["tokens"]) >= 3
    for way in got.values():
        assert way["tokens"] == full_attention["tokens"][: len(way["tokens"])]
        gaps = [gap(way, full_attention, number) for number in range(len(way["tokens"]))]
        assert max(gaps) < TOLERANCE, gaps
