# SPDX-License-Identifier: Apache-2.0
"""The attention backend that vLLM sees: what it supports, its spec, and the layer's forward."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata, RetrievalMetadataBuilder
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.plugin.spec import RetrievalSpec
from vllm_retrieval_attn.plugin.supported import HEAD_SIZES, WITHOUT_US, serves_dtype
from vllm_retrieval_attn.plugin.worker import current_worker

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout


class RetrievalBackend(AttentionBackend):
    """``--attention-backend retrieval``."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list["CacheDType"]] = ["auto", "bfloat16", "float16"]
    _in_flight_tokens: ClassVar[int] = 0
    _split_tokens: ClassVar[tuple[int, int, int]] = (0, 0, 0)

    @staticmethod
    def get_name() -> str:
        return "RETRIEVAL"

    @staticmethod
    def get_impl_cls() -> type["RetrievalImpl"]:
        return RetrievalImpl

    @staticmethod
    def get_builder_cls() -> type[RetrievalMetadataBuilder]:
        return RetrievalMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return HEAD_SIZES

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return serves_dtype(dtype, current_platform.is_cpu())

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: "KVCacheSpec | None" = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> "tuple[KVCacheLayout, ...] | None":
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            return CPUAttentionBackend.supported_kv_cache_layouts()
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        return FlashAttentionBackend.supported_kv_cache_layouts()

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A retrieval layer holds sinks and a window, not its whole context."""
        if not isinstance(spec, FullAttentionSpec):
            return spec
        sink, window, resident = cls._split_tokens
        return RetrievalSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            sink_tokens=sink,
            window_tokens=window,
            resident_tokens=resident,
            in_flight_tokens=cls._in_flight_tokens,
        )


class RetrievalImpl(AttentionImpl[RetrievalMetadata]):
    """One layer. The device's part is in device/cpu.py and device/cuda.py."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        vllm_config = get_current_vllm_config()
        dtype: Any = vllm_config.model_config.dtype
        unsupported = {
            f"head size {head_size} (supported: {HEAD_SIZES})": head_size not in HEAD_SIZES,
            f"dtype {dtype}": not RetrievalBackend.supports_dtype(dtype),
            f"KV cache dtype {kv_cache_dtype}": kv_cache_dtype not in RetrievalBackend.supported_kv_cache_dtypes,
            "ALiBi": alibi_slopes is not None,
            "a soft cap on attention scores": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "learned attention sinks": sinks is not None,
            "a sliding-window layer": sliding_window is not None,
            f"attention options {sorted(unknown)}": bool(unknown),
        }
        for what, present in unsupported.items():
            if present:
                raise ValueError(
                    f"retrieval: this model needs {what}, which the retrieval backend does not support; {WITHOUT_US}"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._vllm_config = vllm_config
        config = resolved_config(vllm_config)
        RetrievalBackend._split_tokens = (config.sink_tokens, config.window_tokens, config.resident_tokens)
        RetrievalBackend._in_flight_tokens = vllm_config.max_in_flight_tokens
        if current_platform.is_cpu():
            from vllm_retrieval_attn.device.cpu import CpuLayer

            self._device: Any = CpuLayer(self.scale)
        else:
            from vllm_retrieval_attn.device.cuda import CudaLayer

            self._device = CudaLayer(self.scale, head_size)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The first layer takes the memory of the sketch: vLLM measures what is left for pages after this."""
        from vllm_retrieval_attn.plugin.sketching import load_sketch

        if not current_platform.is_cpu():
            load_sketch(self._vllm_config, self)

    def warm_up(self, worker: Any, cache: torch.Tensor) -> None:
        """Run once what a long prompt runs, on a GPU; see device/warm_up.py."""
        from vllm_retrieval_attn.device.warm_up import warm_up

        warm_up(worker, self._device, cache, self._vllm_config.scheduler_config.max_num_batched_tokens)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RetrievalMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over paged and host tokens.

        Args:
            query, output: (tokens, heads, head_size). key, value: (tokens, kv_heads, head_size).
            kv_cache: (blocks, kv_heads, block_size, 2 * head_size).
            attn_metadata: None in a profiling run.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("retrieval: fused output quantization is not supported")
        if attn_metadata is None:
            return output.fill_(0)
        worker = current_worker()
        plan = worker.plan(attn_metadata) if worker is not None else None
        n = attn_metadata.num_tokens
        number = worker.layer_number(layer.layer_name) if worker is not None else 0
        self._device.forward(worker, number, query[:n], key[:n], value[:n], kv_cache, attn_metadata, plan, output[:n])
        return output
