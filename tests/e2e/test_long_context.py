"""Planted numbers over a long document on the real 64K model; `none` shows what retrieval adds."""

import json
import subprocess
import sys

import pytest

from tests.conftest import SHARED
from vllm_retrieval_attn.bench.models import smollm2_64k
from vllm_retrieval_attn.ownership import resident_blocks_bound


def ask(tmp_path, mode, length, count):
    model = smollm2_64k(SHARED)
    if model is None:
        pytest.skip("../shared/models is absent")
    options = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 400_000_000,
        "max_num_batched_tokens": 2048,
        "retrieval": {"host_memory_gb": 2},
    }
    out = tmp_path / "answers.json"
    command = [sys.executable, "-m", "vllm_retrieval_attn.bench.needles", "--model", str(model), "--mode", mode]
    command += ["--length", str(length), "--count", str(count), "--at-once", str(count), "--tokens", "10"]
    command += ["--options", json.dumps(options), "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(out.read_text())


def test_the_default_finds_a_number_in_16k_tokens_within_the_bound(tmp_path):
    found = ask(tmp_path, "attention", 16_000, 1)
    assert [row["right"] for row in found["rows"]] == [True]
    assert found["max_blocks"] <= resident_blocks_bound(128, 512, 2048, 128)


def test_none_misses_what_the_host_holds(tmp_path):
    assert not any(row["right"] for row in ask(tmp_path, "none", 3_000, 2)["rows"])
