"""Hybrid models: global layers use our backend, sliding-window layers vLLM's own; tokens stay the same."""

import json
import subprocess
import sys

import pytest

from tests.e2e.hybrid import make_model


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("gemma3"))
    results = {}
    for backend in ("CPU_ATTN", "retrieval"):
        out = folder / f"{backend}.json"
        command = [sys.executable, "-m", "tests.e2e.hybrid", str(folder), str(out), backend]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        results[backend] = json.loads(out.read_text())
    return results


def test_only_global_layers_use_retrieval(found):
    backends = list(found["retrieval"]["backends"].values())
    assert sorted(backends) == ["CPU_ATTN"] * 5 + ["RETRIEVAL"]


def test_greedy_tokens_equal_vllms_own_backend(found):
    assert found["retrieval"]["tokens"] == found["CPU_ATTN"]["tokens"]
