# SPDX-License-Identifier: Apache-2.0
"""What the backend does not serve, refused while vLLM's configuration is made: later it would be a line among the
tracebacks of several processes. What a configuration does not tell is refused by the layers (plugin/backend.py)."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_retrieval_attn.device.decode_step import MOST_GROUP, MOST_LAYERS, MOST_TOKENS

if TYPE_CHECKING:
    from vllm.config import ModelConfig

HEAD_SIZES = [64, 80, 96, 128, 256]
WITHOUT_US = "serve it without --attention-backend retrieval"


def refuse(what: str, instead: str) -> None:
    raise ValueError(f"retrieval: {what} is not supported; {instead}")


def serves_dtype(dtype: torch.dtype, on_cpu: bool) -> bool:
    return dtype in ((torch.float32, torch.bfloat16) if on_cpu else (torch.bfloat16, torch.float16))


def check_engine(options: Any) -> None:
    """Refuse by names that vLLM's arguments and its configuration share: the arguments are looked at first, before
    vLLM has complaints of its own, and the configuration, since it hears of more than arguments."""
    if options.decode_context_parallel_size > 1:
        refuse("decode context parallelism", "set --decode-context-parallel-size 1")
    if options.prefill_context_parallel_size > 1:
        refuse("prefill context parallelism", "set --prefill-context-parallel-size 1")
    if options.pipeline_parallel_size > 1:
        refuse("pipeline parallelism", "set --pipeline-parallel-size 1")
    if options.data_parallel_size > 1:
        refuse("data parallelism inside one server", "run one server for each replica")
    if options.enable_dbo:
        refuse("dual-batch overlap", "drop --enable-dbo")


def check_model(model: "ModelConfig", on_cpu: bool) -> None:
    """Refuse a model by its configuration."""
    if model.runner_type != "generate":
        refuse(f"a {model.runner_type} model", WITHOUT_US)
    if model.is_encoder_decoder:
        refuse("an encoder-decoder model", WITHOUT_US)
    if model.use_mla:
        refuse("a model with multi-head latent attention (MLA)", WITHOUT_US)
    if model.is_hybrid or model.is_attention_free:
        refuse("a model with state-space layers", WITHOUT_US)
    if model.is_mm_prefix_lm:
        refuse("attention among the tokens of an image", "set --language-model-only to serve text alone")
    for what, present in _attention(model.hf_text_config).items():
        if present:
            refuse(f"a model with {what}", WITHOUT_US)
    if model.get_head_size() not in HEAD_SIZES:
        refuse(f"head size {model.get_head_size()}", f"those of {HEAD_SIZES} are; {WITHOUT_US}")
    dtype: Any = model.dtype
    if not serves_dtype(dtype, on_cpu):
        name, where = str(dtype).removeprefix("torch."), "on CPU" if on_cpu else "on a GPU"
        refuse(f"a model in {name} {where}", "set --dtype bfloat16")


def _attention(text: Any) -> dict[str, bool]:
    """Kinds of attention that are not ours, and whether a Hugging Face configuration tells of them."""
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    named = getattr(text, "model_type", None)
    return {
        f"layers of type {', '.join(sorted(map(str, kinds)))}": bool(kinds),
        "ALiBi": named == "bloom" or bool(getattr(text, "alibi", False)),
        "a soft cap on attention scores": bool(getattr(text, "attn_logit_softcapping", None)),
        "KV sharing between layers": bool(getattr(text, "num_kv_shared_layers", 0)),
        "learned attention sinks": named == "gpt_oss" or bool(getattr(text, "attention_sinks", False)),
        "dual chunk attention": bool(getattr(text, "dual_chunk_attention_config", None)),
    }


def check_codes(layers: int, group: int, max_len: int) -> None:
    """Refuse what the kernels for codes on the GPU are not written for.

    Args:
        layers: retrieval layers. group: query heads of a KV head. max_len: tokens of a request.
    """
    instead = "set sketch_gb to 0, so that the CPU searches alone"
    for what, given, most in (
        ("max_model_len {}", max_len, MOST_TOKENS),
        ("{} query heads a KV head", group, MOST_GROUP),
        ("{} layers", layers, MOST_LAYERS),
    ):
        if given > most:
            refuse(f"{what.format(given)} with codes on the GPU", f"{most} at most; {instead}")
