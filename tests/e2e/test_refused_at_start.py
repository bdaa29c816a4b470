# SPDX-License-Identifier: Apache-2.0
"""What is not supported, or knobs that can not work, stop the start with one line that says what to change."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.one_line import assert_clear
from vllm_retrieval_attn.bench.models import smollm2


def start(retrieval=None, backend="retrieval", **options):
    from vllm.engine.arg_utils import EngineArgs

    if retrieval is not None:
        options["additional_config"] = {"retrieval": retrieval}
    options = {"kv_cache_memory_bytes": 10**8, "max_model_len": 4096} | options
    return EngineArgs(model=str(smollm2()), attention_backend=backend, **options).create_engine_config()


@pytest.mark.parametrize("name", ["retrieval", "RETRIEVAL", "Retrieval"])
def test_the_name_is_accepted_in_any_case_and_turns_the_connector_on(name):
    config = start({"host_memory_gb": 1, "index": "flat"}, backend=name)
    assert config.kv_transfer_config.kv_connector == "RetrievalConnector"
    knobs = config.kv_transfer_config.kv_connector_extra_config["retrieval"]
    assert knobs["host_pages"] == 10**9 // (knobs["bytes_per_token"] * 1024)
    assert knobs["threads"] >= 1


def test_the_default_host_memory_leaves_some_free():
    knobs = start().kv_transfer_config.kv_connector_extra_config["retrieval"]
    import psutil

    assert 0 < knobs["host_memory_gb"] * 1e9 < psutil.virtual_memory().available


@pytest.mark.parametrize(
    ("retrieval", "options", "says"),
    [
        ({"sinks": 4}, {}, "unknown knob 'sinks'"),
        ({"window_tokens": 0}, {}, "window_tokens"),
        ({"page_tokens": 100}, {}, "power of two"),
        ({"segment_tokens": 1024}, {}, "use 'page_tokens'"),
        ({"budget": 0.1}, {}, "use 'rows'"),
        ({"rows": 5000}, {}, "raise max_rows"),
        ({"tau": 1e-6}, {}, "lower min_tau"),
        ({"tau": float("inf")}, {}, "tau"),
        ({"index": "lsh"}, {}, "index"),
        ({"workers": 9}, {}, "at most 3"),
        ({"index": "ivf"}, {}, "index"),
        ({"host_memory_gb": 10_000}, {}, "lower host_memory_gb"),
        ({"host_memory_gb": 0.001}, {}, "raise host_memory_gb"),
        ({"window_tokens": 5000}, {}, "lower them"),
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype auto"),
        ({}, {"kv_cache_dtype": "float16", "dtype": "bfloat16"}, "--kv-cache-dtype auto"),
        ({}, {"block_size": 24}, "multiple of 16"),
        ({}, {"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ({}, {"hf_overrides": {"sliding_window": 512}}, "sliding-window layers only"),  # as Mistral's first models
        ({}, {"kv_transfer_config": "other"}, "drop --kv-transfer-config"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "drop --speculative-config"),
        ({}, {"speculative_config": {}}, "drop --speculative-config"),
        ({}, {"kv_cache_dtype": "fp8_ds_mla"}, "--kv-cache-dtype auto"),
        ({}, {"block_size": 8}, "multiple of 16"),
        ({}, {"decode_context_parallel_size": 2}, "--decode-context-parallel-size 1"),
        ({}, {"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 1"),
        ({}, {"data_parallel_size": 2}, "run one server for each replica"),
        ({}, {"data_parallel_size": 2, "data_parallel_rank": 0}, "run one server for each replica"),
        ({}, {"enable_dbo": True}, "drop --enable-dbo"),
        ({}, {"enable_sleep_mode": True}, "drop --enable-sleep-mode"),
        ({}, {"kv_transfer_config": {"kv_connector": "NixlConnector"}}, "(NixlConnector)"),
        ({}, {"max_model_len": 640}, "max_model_len = 640"),
        ({}, {"runner": "pooling"}, "a pooling model"),
        ({}, {"convert": "embed"}, "a pooling model"),
        ({"sketch_gb": 1}, {}, "sketch_gb=1 has no meaning on CPU; drop it"),
        ({"index": "flat", "sketch_gb": 1}, {}, "drop it"),
        ([{"rows": 5}], {}, "JSON object"),
    ],
)
def test_refused_with_one_line(retrieval, options, says):
    from vllm.config import KVTransferConfig

    if options.get("kv_transfer_config") == "other":
        options = {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")}
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        start(retrieval, **options)
    assert_clear(str(refused.value), says)


def test_a_ray_that_does_not_answer_is_named_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        start({"host_memory_gb": 1, "ray_address": address})
    with pytest.raises(ValueError, match=address) as refused:
        start({"host_memory_gb": 1, "ray_address": address})
    assert_clear(str(refused.value), "ray_address", "ray start --head", "leave ray_address out")


def test_a_server_says_it_in_one_line_without_a_traceback():
    additional = '{"retrieval": {"rows": 0}}'
    vllm = Path(sys.executable).parent / "vllm"
    command = [
        str(vllm),
        "serve",
        str(smollm2()),
        "--attention-backend",
        "retrieval",
        "--additional-config",
        additional,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert_clear(done.stderr.splitlines()[-1], "rows=0", "greater than or equal to 1")
