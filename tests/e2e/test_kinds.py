"""Kinds of index in the served engine, side by side: the table of `vllm-retrieval eval`."""

import json

import pytest

from tests.engines import EngineRun
from vllm_retrieval_attn.bench.models import smollm2

MODES = ("full", "roar")


def engine_runs(folder):
    out = folder / "kinds.json"
    options = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 1024}
    options["retrieval"] = {"host_memory_gb": 0.5, "segment_tokens": 256, "window_tokens": 256, "budget": 0.3}
    arguments = ("eval", "--model", str(smollm2()), "--modes", ",".join(MODES), "--tasks", "planted,prose")
    arguments += ("--lengths", "1400", "--count", "1", "--score-tokens", "8", "--seed", "2")
    arguments += ("--options", json.dumps(options), "--json", str(out))
    return {"kinds": EngineRun(60, out, "vllm_retrieval_attn.cli", arguments)}


@pytest.fixture(scope="module")
def rows(engine_run):
    return {(row["mode"], row["task"]): row for row in engine_run("kinds")}


def test_every_mode_has_its_rows(rows):
    assert {mode for mode, _ in rows} == set(MODES)


@pytest.mark.parametrize("kind", MODES[1:])
def test_a_kind_answers_the_question_and_is_close_to_full_attention_but_not_exact(rows, kind):
    assert rows[kind, "planted"]["right"] == 1.0
    assert 0 < rows[kind, "prose"]["kl"] < 0.5
