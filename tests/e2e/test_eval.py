# SPDX-License-Identifier: Apache-2.0
"""The served default beside full attention: the table of `vllm-retrieval eval`."""

import json

import pytest

from tests.engines import EngineRun
from vllm_retrieval_attn.bench.models import smollm2

MODES = ("full", "attention")


def engine_runs(folder):
    out = folder / "eval.json"
    options = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 1024}
    options["retrieval"] = {"host_memory_gb": 0.5, "resident_tokens": 0, "rows": 256}
    arguments = ("eval", "--model", str(smollm2()), "--modes", ",".join(MODES), "--tasks", "planted,prose")
    arguments += ("--lengths", "2400", "--count", "1", "--score-tokens", "8", "--seed", "2")
    arguments += ("--options", json.dumps(options), "--json", str(out))
    return {"eval": EngineRun(60, out, "vllm_retrieval_attn.cli", arguments)}


@pytest.fixture(scope="module")
def rows(engine_run):
    return {(row["mode"], row["task"]): row for row in engine_run("eval")}


def test_every_mode_has_its_rows(rows):
    assert {mode for mode, _ in rows} == set(MODES)


@pytest.mark.parametrize("kind", MODES[1:])
def test_it_answers_the_question_and_is_close_to_full_attention_but_not_exact(rows, kind):
    assert rows[kind, "planted"]["right"] == 1.0
    assert 0 < rows[kind, "prose"]["kl"] < 0.02
