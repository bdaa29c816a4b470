# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec of a retrieval layer: what a request costs in paged memory, whatever its length."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_retrieval_attn.core.ownership import Split, cdiv

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(AttentionSpec):
    """Sinks and a recent window stay in pages; the middle is on the host.

    Not a FullAttentionSpec (the hybrid coordinator would trim hits as if every prefix block were
    there) and not a SlidingWindowSpec (vLLM 0.33's worker nulls everything below the window, sinks
    included).
    """

    sink_tokens: int
    window_tokens: int
    resident_tokens: int
    in_flight_tokens: int

    @property
    def split(self) -> Split:
        return Split(self.sink_tokens, self.window_tokens, self.resident_tokens, self.block_size)

    def max_admission_blocks(self, max_model_len: int) -> int:
        """Most blocks that a request ever holds; the runtime gate and the pool's sizing both use it."""
        return min(self.split.blocks_bound(self.in_flight_tokens), cdiv(max_model_len, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        blocks = self.max_admission_blocks(vllm_config.model_config.max_model_len)
        return blocks * self.page_size_bytes
