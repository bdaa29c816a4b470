"""What is not supported, or knobs that can not work, stop the start with one line that says what to change."""

import pytest

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
    ],
)
def test_refused_with_one_line(retrieval, options, says):
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")}
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        start(retrieval, **options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
