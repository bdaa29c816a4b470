"""Hybrid models: global layers use our backend, sliding-window layers vLLM's own; tokens stay the same."""

import pytest

from tests.e2e.hybrid import make_model
from tests.engines import EngineRun


def engine_runs(folder):
    model, runs = make_model(folder / "gemma3"), {}
    for backend in ("CPU_ATTN", "retrieval"):
        out = folder / f"hybrid-{backend}.json"
        arguments = (str(model), str(out), backend)
        runs[f"hybrid {backend}"] = EngineRun(35, out, "tests.e2e.hybrid", arguments)
    return runs


@pytest.fixture(scope="module")
def found(engine_run):
    return {backend: engine_run(f"hybrid {backend}") for backend in ("CPU_ATTN", "retrieval")}


def test_only_global_layers_use_retrieval(found):
    backends = list(found["retrieval"]["backends"].values())
    assert sorted(backends) == ["CPU_ATTN"] * 5 + ["RETRIEVAL"]


def test_greedy_tokens_equal_vllms_own_backend(found):
    assert found["retrieval"]["tokens"] == found["CPU_ATTN"]["tokens"]
