# SPDX-License-Identifier: Apache-2.0
"""What selecting the backend does to vLLM's configuration, and what it refuses at start-up."""

import os
import socket
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.core import config as knobs_module
from vllm_retrieval_attn.core.config import GB, KEY, ResolvedConfig, RetrievalConfig
from vllm_retrieval_attn.core.limits import available_memory
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.device.decode_step import PAGE
from vllm_retrieval_attn.index.packing import bytes_per_key
from vllm_retrieval_attn.plugin.compat import CONNECTOR_MODULE, GRAPHS_KEY, NAME
from vllm_retrieval_attn.plugin.resolved import CONNECTOR, EXTENSION
from vllm_retrieval_attn.plugin.supported import WITHOUT_US, check_codes, check_engine, check_model, refuse
from vllm_retrieval_attn.store.shared_file import promised

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

_RAY_ANSWERS_S = 5.0
_CPU_REQUESTS = 8
"""Requests at full residency that the default CPU pool has room for."""


def _backend_name(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "name", value)).upper()


def _connector(transfer: Any) -> Any:
    return transfer.get("kv_connector") if isinstance(transfer, dict) else transfer.kv_connector


def selected(args: Any) -> bool:
    """Whether these EngineArgs ask for our backend."""
    return NAME in (_backend_name(args.attention_backend), _backend_name(args.attention_config.backend))


def prepare(args: Any) -> RetrievalConfig:
    """Check EngineArgs and fill in what must be there before VllmConfig is built.

    Raises:
        ValueError: one line that says what to change.
    """
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    knobs = knobs_module.parse(args.additional_config)
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        refuse(f"platform {current_platform.device_name}", "run on CPU or on an NVIDIA GPU")
    check_engine(args)
    if args.speculative_config is not None:
        refuse("speculative decoding", "drop --speculative-config")
    if args.enable_sleep_mode:
        refuse("sleep mode", "drop --enable-sleep-mode")
    if args.kv_transfer_config is not None and _connector(args.kv_transfer_config) != CONNECTOR:
        refuse(f"a second KV connector ({_connector(args.kv_transfer_config)})", "drop --kv-transfer-config")
    if args.kv_offloading_size is not None:
        refuse("--kv-offloading-size", "drop it: the host keeps the KV cache already")
    knobs = with_sketch(knobs, current_platform.is_cpu())
    args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={GRAPHS_KEY: knobs.index != "none" and not current_platform.is_cpu()},
    )
    if not args.worker_extension_cls:  # a user's own stays; the routes that need ours then say so
        args.worker_extension_cls = EXTENSION
    sliding = "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"
    args.attention_config = _with_sliding_backend(args.attention_config, sliding)
    return knobs


def with_sketch(knobs: RetrievalConfig, on_cpu: bool) -> RetrievalConfig:
    """The knobs with ``sketch_gb`` 0 where there can be no sketch.

    Raises:
        ValueError: one was asked for, or can not be with the other knobs.
    """
    if knobs.index != "attention" or on_cpu:
        if knobs.sketch_gb:
            where = "on CPU" if on_cpu else f"with index={knobs.index!r}"
            raise ValueError(f"retrieval: sketch_gb={knobs.sketch_gb:g} has no meaning {where}; drop it")
        return knobs.model_copy(update={"sketch_gb": 0.0})
    if knobs.sketch_gb != 0 and knobs.page_tokens != PAGE:
        raise ValueError(
            f"retrieval: page_tokens={knobs.page_tokens} does not go with codes on the GPU; set page_tokens to "
            f"{PAGE}, or sketch_gb to 0"
        )
    return knobs


def _with_sliding_backend(attention_config: Any, name: str) -> Any:
    """Sliding-window layers of hybrid models stay with vLLM's own backend, unless the user chose one."""
    import copy

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    changed = copy.deepcopy(attention_config)
    changed.backend_per_kind = {"sliding_window": AttentionBackendEnum[name], **changed.backend_per_kind}
    return changed


def finish(knobs: RetrievalConfig, vllm_config: "VllmConfig") -> "VllmConfig":
    """Refuse what is not supported, resolve the knobs and hand them to every process."""
    check_supported(vllm_config)
    check_runner(knobs, vllm_config)
    resolved = resolve_for(knobs, vllm_config)
    assert vllm_config.kv_transfer_config is not None
    vllm_config.kv_transfer_config.kv_connector_extra_config[KEY] = resolved.model_dump()
    return vllm_config


def check_supported(vllm_config: "VllmConfig") -> None:
    """Rule 7 of the design: unsupported means refused at start-up, with one clear line."""
    from vllm.platforms import current_platform

    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    check_model(model, current_platform.is_cpu())
    if vllm_config.speculative_config is not None:
        refuse("speculative decoding", "drop --speculative-config")
    check_engine(parallel)
    if cache.cache_dtype not in ("auto", "bfloat16", "float16"):
        refuse(f"KV cache dtype {cache.cache_dtype}", "set --kv-cache-dtype auto")
    wanted = str(model.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", wanted):
        refuse(f"KV cache dtype {cache.cache_dtype} with a model in {wanted}", "set --kv-cache-dtype auto")
    if cache.block_size % 16:
        refuse(f"block size {cache.block_size}", "set --block-size to a multiple of 16")
    if not count_full_attention_layers(model, parallel):
        refuse("a model with sliding-window layers only", WITHOUT_US)


def check_runner(knobs: RetrievalConfig, vllm_config: "VllmConfig") -> None:
    """vLLM's first model runner replays graphs without telling the connector of their batch."""
    from vllm.platforms import current_platform

    if knobs.index != "none" and current_platform.is_cuda() and not vllm_config.use_v2_model_runner:
        refuse("vLLM's first model runner on a GPU", "set VLLM_USE_V2_MODEL_RUNNER=1")


def count_full_attention_layers(model: "ModelConfig", parallel: "ParallelConfig") -> int:
    """Layers that our backend serves; a hybrid model lists its layers' kinds in its config."""
    text = model.hf_text_config
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return sum(kind == "full_attention" for kind in kinds)
    if (
        getattr(text, "sliding_window", None)
        and getattr(text, "use_sliding_window", True)
        and model.get_sliding_window()
    ):
        return 0
    return model.get_num_layers(parallel)


def kv_bytes_per_token(vllm_config: "VllmConfig") -> int:
    """Bytes of K and V of one token in one rank's full-attention layers."""
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = vllm_config.cache_config.cache_dtype
    dtype: Any = model.dtype if name == "auto" else STR_DTYPE_TO_TORCH_DTYPE[name]
    itemsize = torch.empty((), dtype=dtype).element_size()
    layers = count_full_attention_layers(model, parallel)
    return layers * model.get_num_kv_heads(parallel) * 2 * model.get_head_size() * itemsize


def index_bytes_per_token(vllm_config: "VllmConfig") -> int:
    """Bytes of one token in the indexes of one rank's full-attention layers."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = count_full_attention_layers(model, parallel)
    return round(layers * model.get_num_kv_heads(parallel) * bytes_per_key(model.get_head_size()))


def query_heads_of_a_kv_head(vllm_config: "VllmConfig") -> int:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)


def check_ray(address: str | None) -> None:
    """Whether something listens where the CPU workers' supervisor would look for Ray, much later and for long."""
    found = knobs_module.ray_port(address) if address is not None else None
    if found is None:  # a local Ray, or one that Ray itself looks for
        return
    try:
        socket.create_connection(found, _RAY_ANSWERS_S).close()
    except OSError as error:
        raise ValueError(
            f"retrieval: no Ray answers at ray_address={address} ({error.strerror or error}); start one on this host "
            "(ray start --head), or leave ray_address out"
        ) from None


def resolve_for(knobs: RetrievalConfig, vllm_config: "VllmConfig") -> ResolvedConfig:
    """The knobs resolved for this engine; sizes the paged pool on CPU, where vLLM would take most of the RAM."""
    from vllm.platforms import current_platform

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    per_token = kv_bytes_per_token(vllm_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    check_ray(knobs.ray_address)
    if knobs.sketch_gb != 0:
        check_codes(
            count_full_attention_layers(vllm_config.model_config, vllm_config.parallel_config),
            query_heads_of_a_kv_head(vllm_config),
            vllm_config.model_config.max_model_len,
        )
    if knobs.sink_tokens + knobs.window_tokens >= vllm_config.model_config.max_model_len:
        raise ValueError(
            f"retrieval: sink_tokens + window_tokens = {knobs.sink_tokens + knobs.window_tokens} reach max_model_len = "
            f"{vllm_config.model_config.max_model_len}, so nothing would ever leave the paged cache; lower them, or "
            "serve without --attention-backend retrieval"
        )
    spoken_for = promised()  # to other servers, which have not touched all of theirs
    if current_platform.is_cpu():
        if cache.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            split = Split(knobs.sink_tokens, knobs.window_tokens, knobs.resident_tokens, cache.block_size)
            blocks = split.blocks_bound(vllm_config.max_in_flight_tokens)
            requests = min(_CPU_REQUESTS, scheduler.max_num_seqs)
            wanted = requests * blocks * cache.block_size * per_token
            cache.kv_cache_memory_bytes = min(max(wanted, GB), available_memory() // 4)
        spoken_for += cache.kv_cache_memory_bytes or 0
    return knobs_module.resolve(
        knobs,
        index_bytes_per_token=index_bytes_per_token(vllm_config) if knobs.index == "attention" else 0,
        bytes_per_token=per_token,
        layers=count_full_attention_layers(vllm_config.model_config, vllm_config.parallel_config),
        kv_heads=vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config),
        block_size=cache.block_size,
        ranks=ranks,
        spoken_for=spoken_for,
    )
