# SPDX-License-Identifier: Apache-2.0
"""vLLM's block manager for retrieval layers: frees the middle of a request, counts host memory."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_retrieval_attn.core.ledger import HostLedger
from vllm_retrieval_attn.core.ownership import cdiv
from vllm_retrieval_attn.plugin.spec import RetrievalSpec


class RetrievalManager(SingleTypeKVCacheManager):
    """Holds ``[0, S)`` and ``[W0, ...)`` of each request; ``[S, W0)`` becomes null blocks.

    Hits in the paged prefix cache are declined: the middle of a cached prefix has no paged blocks to hit. What is
    kept on the host (core/prefixes.py) is brought by the connector.
    """

    kv_cache_spec: RetrievalSpec
    ledger: HostLedger | None = None
    """Bound by the connector to the first retrieval group of a model; other groups leave it None."""

    def __init__(self, kv_cache_spec: RetrievalSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        self._split = kv_cache_spec.split
        kwargs["max_admission_blocks_per_request"] = self._split.blocks_bound(kv_cache_spec.in_flight_tokens)
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self._sink_blocks = self._split.sink_end // self.block_size
        self._admitting: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if self.ledger is not None:
            if apply_admission_cap:
                # The gate of a new request: its whole prompt is reserved if it is let in.
                self._admitting[request_id] = num_tokens
            if not self.ledger.fits(request_id, num_tokens):
                return self.block_pool.num_gpu_blocks + 1  # more than there are: not now
        if total_computed_tokens > num_local_computed_tokens and not self.req_to_blocks.get(request_id):
            sinks, first, last = self._kept(total_computed_tokens, num_tokens)
            if apply_admission_cap and self.max_admission_blocks_per_request is not None:
                return min(sinks + last - first, self.max_admission_blocks_per_request)
            return sinks + last - first
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            *args,
            **kwargs,
        )

    def _kept(self, computed: int, tokens: int) -> tuple[int, int, int]:
        """Sink blocks, and first and last (exclusive) window block, of a request with ``computed`` of ``tokens``."""
        last = cdiv(tokens, self.block_size)
        sinks = min(self._sink_blocks, last)
        return sinks, min(max(sinks, self._split.window_start(computed) // self.block_size), last), last

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Blocks for the sinks and the window of tokens that the connector brings; what lies between is on the host."""
        total = num_local_computed_tokens + num_external_computed_tokens
        sinks, first, last = self._kept(total, total)
        blocks = self.block_pool.get_new_blocks(sinks + last - first)
        held = self.req_to_blocks[request_id]
        held.extend([*blocks[:sinks], *[self._null_block] * (first - sinks), *blocks[sinks:]])
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        if self.ledger is not None:
            self.ledger.hold(request_id, max(num_tokens, self._admitting.pop(request_id, 0)))
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of ``[S, W0)``. Their K and V went to the host when they were computed."""
        first_kept = self._split.window_start(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, self._sink_blocks, first_kept // self.block_size)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._admitting.pop(request_id, None)
        if self.ledger is not None:
            self.ledger.release(request_id)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Nothing is published to the prefix cache (see the class)."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0
