# SPDX-License-Identifier: Apache-2.0
"""examples/batch.py; the others are run by tests/e2e/test_serve.py, on its server."""

import json

import pytest

from tests.engines import EngineRun
from vllm_retrieval_attn.bench.models import smollm2


def engine_runs(folder):
    out = folder / "batch.json"
    texts = [folder / f"{name}.txt" for name in ("short", "long")]
    for text, times in zip(texts, (3, 90), strict=True):
        text.write_text("Attention sinks are the first tokens. The window is what came last. " * times)
    knobs = {"host_memory_gb": 0.3, "resident_tokens": 512, "window_tokens": 256}
    arguments = (
        str(smollm2()), *map(str, texts), "--question", "What is this about?", "--out", str(out), "--max-model-len",
        "4096", "--max-tokens", "4", "--retrieval", json.dumps(knobs),
    )  # fmt: skip
    return {"batch": EngineRun(50, out, "examples.batch", arguments)}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("batch")


def test_each_file_has_an_answer_and_the_long_one_lay_on_the_host(found):
    short, long = found
    assert short["answer"]
    assert long["answer"]
    assert short["retrieval"]["path"] == "paged"
    assert long["retrieval"]["host_tokens"] > 500
