# SPDX-License-Identifier: Apache-2.0
"""Time per output token as `vllm bench serve` sees it over HTTP is what `vllm-retrieval bench decode` measures."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import SHARED

TOKENIZER = os.environ.get("RETRIEVAL_TEST_TOKENIZER", str(SHARED / "models" / "smollm2-135m-64k"))
CONTEXT, TOKENS, ROWS = 32_000, 200, 512
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(not os.path.isdir(TOKENIZER), reason="needs a tokenizer: ../shared/models is absent"),
]


@pytest.fixture
def shape(monkeypatch):
    """Llama-3-8B's but for the words, which are those of the tokenizer."""
    from vllm_retrieval_attn.bench import decode

    monkeypatch.setitem(decode.SHAPES, "words", {**decode.SHAPES["llama-3-8b"], "vocab_size": 49_152})
    return "words"


def over_http(shape, folder) -> float:
    """Mean milliseconds a token, of two requests one after the other."""
    from vllm_retrieval_attn.bench.decode import _LEAST_TAU, write_shape
    from vllm_retrieval_attn.bench.http import free_port, is_up

    knobs = {"host_memory_gb": 8, "rows": ROWS, "tau": _LEAST_TAU, "min_tau": _LEAST_TAU, "fidelity": 0}
    port, log = free_port(), folder / "log"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
    }
    server = subprocess.Popen(
        [
            *VLLM, "serve", str(write_shape(shape, folder)), "--tokenizer", TOKENIZER, "--load-format", "dummy",
            "--attention-backend", "retrieval", "--additional-config", json.dumps({"retrieval": knobs}),
            "--max-model-len", "40000", "--max-num-seqs", "4", "--served-model-name", "m", "--port", str(port),
            "--host", "127.0.0.1", "--gpu-memory-utilization", "0.7",
        ],
        stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not is_up(f"http://127.0.0.1:{port}"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        result = folder / "result.json"
        subprocess.run(
            [
                *VLLM, "bench", "serve", "--model", "m", "--tokenizer", TOKENIZER, "--port", str(port), "--host",
                "127.0.0.1", "--dataset-name", "random", "--random-input-len", str(CONTEXT), "--random-output-len",
                str(TOKENS), "--num-prompts", "2", "--max-concurrency", "1", "--ignore-eos", "--save-result",
                "--result-filename", str(result),
            ],
            check=True, env=environment, timeout=120,
        )  # fmt: skip
        found = json.loads(result.read_text())
        assert found["completed"] == 2
        return float(found["mean_tpot_ms"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def in_process(shape) -> float:
    """The same by `bench decode`."""
    from vllm_retrieval_attn.bench.decode import Load, compare

    options = {"gpu_memory_utilization": 0.7, "retrieval": {"host_memory_gb": 8}}
    (row,) = compare(shape, ["sketch"], [Load(CONTEXT, 1, TOKENS, ROWS)], options)
    assert row["graph"] == 1
    return float(row["step_ms_p50"])


def test_they_agree_within_five_percent(shape, tmp_path):
    http, alone = over_http(shape, tmp_path), in_process(shape)
    print(f"TPOT over HTTP {http:.2f} ms, bench decode {alone:.2f} ms")
    assert abs(http / alone - 1) < 0.05
