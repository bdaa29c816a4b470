# SPDX-License-Identifier: Apache-2.0
"""The host work of a step: what to mirror, which rows to search, which prefill rows to stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.device.sketch_plan import SketchPlan, no_tokens, stacked
from vllm_retrieval_attn.store.layout import ROW_FIELDS, TAU_UNIT

if TYPE_CHECKING:
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.store.arena import Arena
    from vllm_retrieval_attn.store.requests import RequestStore

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class HostRow:
    """A row that also attends to host tokens ``[0, host_tokens)`` of its store, exactly."""

    row: int
    first: int
    last: int
    store: "RequestStore"
    host_tokens: int


@dataclass
class StepPlan:
    """Host work of one batch, shared by all its retrieval layers.

    Attributes:
        mirror_tokens, mirror_pages, mirror_offsets: batch tokens to copy to the arena and where to.
        decode_tokens: (D,) batch tokens of rows with one query that attend to the host.
        decode_rows: (D, ROW_FIELDS) int64, their message (see store/layout.py).
        decode_ids: their requests. decode_hosts: what they attend to.
        attends_here: the workers are late or gone, so the engine attends to it itself.
        prefill: rows to stream back from the arena.
        learned: first and last batch token that the model's space is learned from.
        growth: host tokens of each request that may be indexed once what was written before this step has arrived.
        rows_read: (D,) int64, summed over layers and KV heads. searches: how many of those were summed.
        failed: requests of this step whose search failed.
        probe: row of the message to compare with exact attention, -1: none.
        sketch: what the sketch on the GPU has to do; None where there is none.
        device: the CUDA layer's copy of the index arrays; None on CPU. stream: how its prefill rows are streamed.
    """

    mirror_tokens: Ints = field(default_factory=no_tokens)
    mirror_pages: Ints = field(default_factory=no_tokens)
    mirror_offsets: Ints = field(default_factory=no_tokens)
    decode_tokens: Ints = field(default_factory=no_tokens)
    decode_rows: Ints = field(default_factory=no_tokens)
    decode_ids: list[str] = field(default_factory=list)
    decode_hosts: list[HostRow] = field(default_factory=list)
    attends_here: bool = False
    prefill: list[HostRow] = field(default_factory=list)
    learned: tuple[int, int] = (0, 0)
    growth: list[tuple["RequestStore", int]] = field(default_factory=list)
    rows_read: Ints = field(default_factory=no_tokens)
    searches: int = 0
    failed: set[str] = field(default_factory=set)
    probe: int = -1
    sketch: SketchPlan | None = None
    device: Any = None
    stream: Any = None

    @property
    def searched(self) -> bool:
        """Whether workers have something to do in this step."""
        return len(self.decode_ids) > len(self.failed)


def make_plan(
    metadata: "RetrievalMetadata",
    arena: "Arena",
    epochs: dict[str, int],
    split: Split,
    options: Callable[[str], SearchOptions] = lambda request_id: SearchOptions(),
    graph: bool = False,
) -> StepPlan:
    """Resolve a batch against the arena: give pages to new tokens and find what lies on the host.

    Args:
        epochs: admission epoch of each request that may need the host; rows of others stay in pages.
        split: where tokens are divided. options: how to search for a request.
        graph: the step replays a graph; those of a sketch find out themselves where tokens go.

    Raises:
        RuntimeError: scheduler and worker disagree on what a request has on the host.
    """
    mirrored: list[tuple[Ints, Ints, Ints]] = []
    coded: list[tuple[Ints, Ints, Ints, Ints]] = []
    decode_tokens: list[int] = []
    decode_rows: list[tuple[int, ...]] = []
    plan = StepPlan(sketch=SketchPlan() if arena.codes is not None else None)
    sketch = plan.sketch
    sinks, indexed = split.sink_end, arena.layout.indexed
    assert metadata.request_ids is not None
    for row, request_id in enumerate(metadata.request_ids):
        epoch = epochs.get(request_id)
        length = int(metadata.query_lens[row])
        start, computed = int(metadata.query_start[row]), int(metadata.computed[row])
        if epoch is None or length == 0:
            if graph and sketch is not None:
                sketch.add_empty(start)
            continue
        store = arena.open(request_id, epoch)
        if store.sink >= 0 and computed < min(sinks, computed + length):
            span = computed, min(sinks, computed + length)
            mirrored.append((np.arange(start, start + span[1] - span[0]), *arena.sink_places(store.sink, *span)))
        old, new = max(0, computed - sinks), max(0, computed + length - sinks)
        if arena.filled and old > store.tokens:
            arena.grow(store, old)
            store.written(old)
        if old > store.tokens:  # the scheduler counts on KV that this admission never had: no answer from noise
            raise RuntimeError(f"retrieval: {request_id}: host tokens {store.tokens} to {old} were never written")
        if new > old:
            arena.grow(store, new)
            if not graph or sketch is None:
                _copy_tokens(arena, store, (old, new), start + length, mirrored, coded)
            store.written(new)
        host_tokens = int(metadata.windows[row]) - sinks
        if graph and sketch is not None:
            how = options(request_id)
            if not store.sketched:
                raise RuntimeError(f"retrieval: {request_id} has no codes in a step that replays a graph")
            sketch.add(store, start, host_tokens, old if new > old else -1, computed, how)
            continue
        if host_tokens <= 0:
            continue
        if length > 1:
            plan.prefill.append(HostRow(row, start, start + length, store, host_tokens))
        how = options(request_id)
        if sketch is not None and store.sketched and not how.exact:
            if length == 1:
                sketch.add(store, start, host_tokens, -1, computed, how)
            continue
        covered = split.indexed_tokens(computed) if indexed and not how.exact else 0
        plan.growth.append((store, covered))
        if length == 1:
            searched = 0 if covered <= how.rows else covered
            tau = max(1, round(how.tau / TAU_UNIT))
            numbers = (store.slot, store.generation, host_tokens, searched, computed, how.rows, tau, how.seed)
            decode_rows.append(numbers)
            decode_tokens.append(start)
            plan.decode_ids.append(request_id)
            plan.decode_hosts.append(HostRow(row, start, start + 1, store, host_tokens))
    if mirrored:
        plan.mirror_tokens, plan.mirror_pages, plan.mirror_offsets = stacked(mirrored)
    if coded and sketch is not None:
        sketch.encode_tokens, sketch.encode_pages, sketch.encode_offsets, sketch.encode_spaces = stacked(coded)
    plan.decode_tokens = np.array(decode_tokens, np.int64)
    plan.rows_read = np.zeros(len(decode_tokens), np.int64)
    plan.decode_rows = np.array(decode_rows, np.int64).reshape(-1, ROW_FIELDS)
    return plan


def _copy_tokens(
    arena: "Arena",
    store: "RequestStore",
    span: tuple[int, int],
    end: int,
    mirrored: list[tuple[Ints, Ints, Ints]],
    coded: list[tuple[Ints, Ints, Ints, Ints]],
) -> None:
    """Note where host tokens ``span`` go, the last of which is batch token ``end - 1``."""
    tokens = np.arange(end - (span[1] - span[0]), end)
    pages, offsets = arena.token_positions(store, *span)
    mirrored.append((tokens, pages, offsets))
    if store.sketched:
        numbers = np.asarray(store.codes, np.int64)[np.arange(*span) // arena.layout.page_tokens]
        coded.append((tokens, numbers, offsets, np.full(len(tokens), store.space)))
