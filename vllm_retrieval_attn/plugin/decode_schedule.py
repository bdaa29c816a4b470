# SPDX-License-Identifier: Apache-2.0
"""How FlashAttention 3 divides the work of a decode batch, computed once a step; else every layer does it again."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.math_utils import round_up
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers

from vllm_retrieval_attn.plugin.spec import RetrievalSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class DecodeSchedule:
    """Schedules of decode batches, in memory that stays, as a graph's replays need it. As vLLM's own backend makes them
    (v1/attention/backends/flash_attn.py, ``_get_scheduler_metadata``).

    Args:
        vllm_config, spec, layer_names: of the builder. longest: most keys of a row.

    Attributes:
        splits: most parts that a row's keys are divided into; FlashAttention is to be told with the schedule.
    """

    def __init__(
        self, vllm_config: "VllmConfig", spec: RetrievalSpec, layer_names: list[str], longest: int, device: torch.device
    ) -> None:
        self.splits: int = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        self._fixed: dict[str, Any] = {
            "max_seqlen_q": 1,
            "max_seqlen_k": longest,
            "num_heads_q": get_num_attention_heads_from_layers(vllm_config, layer_names),
            "num_heads_kv": spec.num_kv_heads,
            "headdim": spec.head_size,
            "qkv_dtype": spec.dtype,
            "page_size": spec.block_size,
            "causal": True,
            "num_splits": self.splits,
        }
        rows = vllm_config.scheduler_config.max_num_seqs
        self._memory = torch.zeros(1 + round_up(rows, 4) * 4, dtype=torch.int32, device=device)

    def fill(self, starts: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """The schedule of a batch: starts (R + 1,), lens (R,) int32 on the GPU."""
        from vllm.vllm_flash_attn import get_scheduler_metadata

        found = get_scheduler_metadata(len(lens), cache_seqlens=lens, cu_seqlens_q=starts, **self._fixed)
        self._memory[: len(found)] = found
        self._memory[len(found) :] = 0  # a graph for more rows must not meet the schedule of an earlier batch
        return self._memory[: len(found)]


def decode_schedule(
    vllm_config: "VllmConfig", spec: RetrievalSpec, layer_names: list[str], longest: int, device: torch.device
) -> DecodeSchedule | None:
    """A DecodeSchedule, or None where FlashAttention takes none."""
    if device.type != "cuda":
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version(head_size=spec.head_size) != 3:
        return None
    return DecodeSchedule(vllm_config, spec, layer_names, longest, device)
