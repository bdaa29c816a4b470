# SPDX-License-Identifier: Apache-2.0
"""Planted numbers over a long document on the real 64K model; `none` shows what retrieval adds."""

import json

import pytest

from tests.conftest import SHARED
from tests.engines import EngineRun
from vllm_retrieval_attn.bench.models import smollm2_64k
from vllm_retrieval_attn.core.ownership import Split

OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 400_000_000,
    "max_num_batched_tokens": 2048,
    "retrieval": {"host_memory_gb": 2, "resident_tokens": 1024},
}


def engine_runs(folder):
    model = smollm2_64k(SHARED)
    if model is None:
        return {}
    runs = {}
    for mode, length, count, seconds in (("attention", 16_000, 1, 260), ("none", 3_000, 2, 45)):
        out = folder / f"long-{mode}.json"
        arguments = ("--model", str(model), "--mode", mode, "--length", str(length), "--count", str(count))
        arguments += ("--at-once", str(count), "--tokens", "10", "--options", json.dumps(OPTIONS), "--json", str(out))
        runs[f"long {mode}"] = EngineRun(seconds, out, "vllm_retrieval_attn.evaluation.needles", arguments)
    return runs


@pytest.fixture(autouse=True)
def _model():
    if smollm2_64k(SHARED) is None:
        pytest.skip("../shared/models is absent")


def test_the_default_finds_a_number_in_16k_tokens_within_the_bound(engine_run):
    found = engine_run("long attention")
    assert [row["right"] for row in found["rows"]] == [True]
    assert found["max_blocks"] <= Split(128, 512, 1024, 128).blocks_bound(2048)


def test_none_misses_what_the_host_holds(engine_run):
    assert not any(row["right"] for row in engine_run("long none")["rows"])
