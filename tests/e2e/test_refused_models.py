# SPDX-License-Identifier: Apache-2.0
"""Models that are not served: refused by their configuration, and where that tells nothing, by their layers."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.one_line import assert_clear
from vllm_retrieval_attn.plugin import backend
from vllm_retrieval_attn.plugin.supported import check_codes, check_model

SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
}  # fmt: skip
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 128, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_target_positions": 2048,
}  # fmt: skip
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 64, "q_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 2,
}  # fmt: skip
BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 2}
MAMBA = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16, "conv_kernel": 4, "expand": 2}
SLIDING = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
ELSEWHERE = "without --attention-backend retrieval"
MODELS = {
    "encoder and decoder": (WHISPER, "an encoder-decoder model", ELSEWHERE),
    "latent attention": (LATENT, "(MLA)", ELSEWHERE),
    "state space": (MAMBA, "state-space layers", ELSEWHERE),
    "sliding windows": (SLIDING, "sliding-window layers only", ELSEWHERE),
    "head size 72": ({"head_dim": 72}, "head size 72", "[64, 80, 96, 128, 256]"),
    "head size 512": ({"head_dim": 512}, "head size 512", "[64, 80, 96, 128, 256]"),
    "float16 on CPU": ({"dtype": "float16"}, "float16 on CPU", "set --dtype bfloat16"),
    "Bloom's ALiBi": (BLOOM, "ALiBi", ELSEWHERE),
    "ALiBi": ({"alibi": True}, "ALiBi", ELSEWHERE),
    "soft cap": ({"attn_logit_softcapping": 50.0}, "a soft cap", ELSEWHERE),
    "KV sharing": ({"num_kv_shared_layers": 1}, "KV sharing", ELSEWHERE),
    "learned sinks": ({"attention_sinks": True}, "learned attention sinks", ELSEWHERE),
    "chunks": ({"layer_types": ["chunked_attention", "full_attention"]}, "layers of type chunked_attention", ELSEWHERE),
    "dual chunks": ({"dual_chunk_attention_config": {"chunk_size": 1024}}, "dual chunk attention", ELSEWHERE),
}  # fmt: skip
LAYERS = {
    "head size": ({"head_size": 72}, "head size 72"),
    "KV cache": ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8"),
    "ALiBi": ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
    "soft cap": ({"logits_soft_cap": 30.0}, "a soft cap on attention scores"),
    "encoder": ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    "KV sharing": ({"kv_sharing_target_layer_name": "layers.0"}, "KV sharing between layers"),
    "sinks": ({"sinks": torch.zeros(2)}, "learned attention sinks"),
    "a window": ({"sliding_window": 64}, "a sliding-window layer"),
    "options": ({"chunks": 3}, "attention options ['chunks']"),
}


@pytest.fixture(autouse=True)
def _look_at_models_in_this_process(monkeypatch):
    """vLLM starts a process for each kind of model, which takes ten seconds."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


def start(folder, model):
    from vllm.engine.arg_utils import EngineArgs

    (folder / "config.json").write_text(json.dumps({**SMALL, **model}))
    knobs = {"host_memory_gb": 0.1, "sink_tokens": 16, "window_tokens": 64}
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, attention_backend="retrieval", kv_cache_memory_bytes=10**8,
        max_model_len=2048, additional_config={"retrieval": knobs},
    ).create_engine_config()  # fmt: skip


def test_the_small_model_itself_is_served(tmp_path):
    assert start(tmp_path, {}).kv_transfer_config.kv_connector == "RetrievalConnector"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_by_its_configuration(name, tmp_path):
    model, what, do = MODELS[name]
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        start(tmp_path, model)
    assert_clear(str(refused.value), what, do)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_refuses_what_the_configuration_did_not_tell(name, monkeypatch):
    options, what = LAYERS[name]
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: config)
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        backend.RetrievalImpl(num_heads=2, scale=1.0, **{"head_size": 64, **options})
    assert_clear(str(refused.value), what, ELSEWHERE)


@pytest.mark.parametrize(
    ("layers", "group", "length", "what"),
    [
        (32, 16, 4096, "16 query heads a KV head"),
        (200, 4, 4096, "200 layers"),
        (32, 4, 1 << 22, "max_model_len 4194304"),
    ],
)
def test_codes_on_the_gpu_are_refused_for_what_their_kernels_can_not(layers, group, length, what):
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        check_codes(layers, group, length)
    assert_clear(str(refused.value), what, "set sketch_gb to 0")


def made_up(**more):
    return SimpleNamespace(
        **{"runner_type": "generate", "is_encoder_decoder": False, "use_mla": False, "is_hybrid": False,
           "is_attention_free": False, "is_mm_prefix_lm": False, "hf_text_config": SimpleNamespace(),
           "get_head_size": lambda: 64, "dtype": torch.bfloat16, **more}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "what", "do"),
    [
        ({"dtype": torch.float32}, "float32 on a GPU", "--dtype bfloat16"),
        ({"is_mm_prefix_lm": True}, "the tokens of an image", "--language-model-only"),
        ({"is_hybrid": True}, "state-space layers", ELSEWHERE),
        ({"hf_text_config": SimpleNamespace(model_type="gpt_oss")}, "learned attention sinks", ELSEWHERE),
    ],
)
def test_what_no_small_model_shows_here(model, what, do):
    check_model(made_up(), on_cpu=False)
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        check_model(made_up(**model), on_cpu=False)
    assert_clear(str(refused.value), what, do)
