# SPDX-License-Identifier: Apache-2.0
"""Attention metadata of a step: where each row's paged tokens lie and where its window starts."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder

from vllm_retrieval_attn.core import ownership
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.plugin import graphs, row_ids
from vllm_retrieval_attn.plugin.decode_schedule import decode_schedule
from vllm_retrieval_attn.plugin.resolved import resolved_config
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
        graph: made while a graph is captured, whose replays read all of this anew from the same memory. paged: a graph
            for batches of which no row attends to the host.
        slot_mapping: (T,) int64 on the device.
        schedule, splits: FlashAttention's, of a decode batch (plugin/decode_schedule.py); None and 0: its own choice.
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
    schedule: torch.Tensor | None = None
    splits: int = 0
    graph: bool = False
    paged: bool = False
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


def to_device(values: Ints, device: torch.device) -> torch.Tensor:
    """An array as a tensor; on a GPU the copy is ordered behind what runs there."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class FixedTables:
    """Tables of decode batches in memory that stays, as a graph's replays need it.

    Args:
        split: where tokens are divided. rows: most rows of a batch.

    Attributes:
        longest: most paged tokens that a decode row attends to, in whole blocks.
    """

    def __init__(self, split: Split, rows: int, device: torch.device) -> None:
        block = split.block_size
        # One row of at most max(R, S + W + B) computed tokens in pages, and its own token.
        blocks = ownership.cdiv(max(split.resident_tokens, split.sink_end + split.window_tokens + block) + 1, block) + 1
        self.longest = blocks * block
        self._sinks, self._block = split.sink_end // block, block
        self._device = device
        self._columns = torch.arange(blocks, device=device)
        self._table = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self._lens = torch.zeros(rows, dtype=torch.int32, device=device)

    def fill(self, table: torch.Tensor, windows: Ints, resident_lens: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Compact table (R, blocks) int32 and lengths (R,) int32 of a batch; arguments as resident_columns'."""
        rows = len(windows)
        numbers = np.stack((windows // self._block - self._sinks, resident_lens))
        shifts, lens = to_device(numbers, self._device)
        columns = torch.where(self._columns < self._sinks, self._columns, self._columns + shifts[:, None])
        torch.gather(table, 1, columns.clamp_(max=table.shape[1] - 1), out=self._table[:rows])
        self._lens[:rows] = lens
        return self._table[:rows], self._lens[:rows]


class RetrievalMetadataBuilder(AttentionMetadataBuilder[RetrievalMetadata]):
    """Builds RetrievalMetadata; keeps no row state across steps, since runners reorder rows."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: "VllmConfig", kv_cache_spec: Any) -> AttentionCGSupport:
        config = resolved_config(vllm_config)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if config.hosted else AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: RetrievalSpec, layer_names: list[str], vllm_config: "VllmConfig", device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._split = kv_cache_spec.split
        self._fixed: FixedTables | None = None
        if device.type != "cpu" and resolved_config(vllm_config).hosted:
            self._fixed = FixedTables(self._split, vllm_config.scheduler_config.max_num_seqs, device)
            self._schedule = decode_schedule(vllm_config, kv_cache_spec, layer_names, self._fixed.longest, device)

    def build_for_cudagraph_capture(self, common_attn_metadata: "CommonAttentionMetadata") -> RetrievalMetadata:
        built = self.build(0, common_attn_metadata)
        return replace(built, graph=True, paged=graphs.capturing_paged(), request_ids=None)

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
        schedule, splits = None, 0
        table, longest = common.block_table_tensor[: common.num_reqs], int(resident_lens.max(initial=1))
        if self._fixed is not None and common.max_query_len == 1:  # the runner may replay a graph for this
            resident_table, lens_dev = self._fixed.fill(table, windows, resident_lens)
            longest = self._fixed.longest
            if self._schedule is not None:
                schedule = self._schedule.fill(common.query_start_loc[: common.num_reqs + 1], lens_dev)
                splits = self._schedule.splits
        else:
            columns = resident_columns(windows, resident_lens, sinks // block, block, table.shape[1])
            resident_table = table.gather(1, to_device(columns, self.device))
            lens_dev = to_device(resident_lens, self.device).to(torch.int32)
        return RetrievalMetadata(
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_resident_len=longest,
            query_start=query_start,
            computed=computed,
            query_lens=query_lens,
            windows=windows,
            resident_lens=resident_lens,
            query_start_dev=common.query_start_loc,
            resident_lens_dev=lens_dev,
            resident_table=resident_table,
            slot_mapping=common.slot_mapping,
            schedule=schedule,
            splits=splits,
            request_ids=row_ids.current(),
        )
