"""Attention metadata of a step: where each row's paged tokens lie and where its window starts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from vllm_retrieval_attn.core import ownership
from vllm_retrieval_attn.plugin import row_ids
from vllm_retrieval_attn.plugin.spec import RetrievalSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_retrieval_attn.device.plan import StepPlan

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class RetrievalMetadata(AttentionMetadata):
    """One batch, R rows and T tokens, of one KV cache group.

    Attributes:
        query_start, computed, query_lens: (R+1,), (R,), (R,) int64, host.
        windows: (R,) int64, ``W0`` of each row.
        resident_lens: (R,) int64, paged tokens that a row attends to, its own included.
        query_start_dev, resident_lens_dev: int32 on the device.
        resident_table: (R, blocks) int32 on the device: sink blocks, then window blocks.
        slot_mapping: (T,) int64 on the device.
        request_ids: one a row; None in a dummy run.
        resolved, plan: set by the first layer, when the scheduler's message is at hand (device/plan.py).
    """

    num_tokens: int
    max_query_len: int
    max_resident_len: int
    query_start: Ints
    computed: Ints
    query_lens: Ints
    windows: Ints
    resident_lens: Ints
    query_start_dev: torch.Tensor
    resident_lens_dev: torch.Tensor
    resident_table: torch.Tensor
    slot_mapping: torch.Tensor
    request_ids: list[str] | None
    resolved: bool = False
    plan: "StepPlan | None" = None


def resident_columns(windows: Ints, resident_lens: Ints, sink_blocks: int, block_size: int, width: int) -> Ints:
    """Columns of the block table that a row's compact table takes: sink blocks, then the window's.

    Args:
        windows, resident_lens: (R,) as in RetrievalMetadata. width: columns of the full table.

    Returns:
        (R, blocks) int64 column numbers; entries past a row's length are arbitrary but valid.
    """
    columns = max(1, ownership.cdiv(int(resident_lens.max(initial=1)), block_size))
    index = np.broadcast_to(np.arange(columns), (len(windows), columns))
    shift = windows // block_size - sink_blocks
    index = np.where(index < sink_blocks, index, index + shift[:, None])
    return np.minimum(index, width - 1)


class RetrievalMetadataBuilder(AttentionMetadataBuilder[RetrievalMetadata]):
    """Builds RetrievalMetadata; keeps no row state across steps, since runners reorder rows."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: RetrievalSpec, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._split = kv_cache_spec.split

    def build(
        self, common_prefix_len: int, common_attn_metadata: "CommonAttentionMetadata", fast_build: bool = False
    ) -> RetrievalMetadata:
        common, split = common_attn_metadata, self._split
        block, sinks = split.block_size, split.sink_end
        assert common.seq_lens_cpu_upper_bound is not None
        query_start = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        seq_lens = common.seq_lens_cpu_upper_bound[: common.num_reqs].numpy().astype(np.int64)
        query_lens = np.diff(query_start)
        computed = np.maximum(seq_lens - query_lens, 0)
        windows = split.window_starts(computed)
        resident_lens = np.maximum(seq_lens - (windows - sinks), 0)
        table = common.block_table_tensor
        columns = resident_columns(windows, resident_lens, sinks // block, block, table.shape[1])
        resident_table = table[: common.num_reqs].gather(1, self._to_device(columns))
        return RetrievalMetadata(
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_resident_len=int(resident_lens.max(initial=1)),
            query_start=query_start,
            computed=computed,
            query_lens=query_lens,
            windows=windows,
            resident_lens=resident_lens,
            query_start_dev=common.query_start_loc,
            resident_lens_dev=self._to_device(resident_lens).to(torch.int32),
            resident_table=resident_table,
            slot_mapping=common.slot_mapping,
            request_ids=row_ids.current(),
        )

    def _to_device(self, values: Ints) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)
