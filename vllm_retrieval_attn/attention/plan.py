"""The host work of a step: what to mirror, which rows to search, which prefill rows to stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_retrieval_attn.options import SearchOptions
from vllm_retrieval_attn.store.layout import ROW_FIELDS

if TYPE_CHECKING:
    from vllm_retrieval_attn.attention.metadata import RetrievalMetadata
    from vllm_retrieval_attn.store.arena import Arena
    from vllm_retrieval_attn.store.segments import RequestStore, Segment

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class PrefillRow:
    """A row of several queries that also attends to host tokens ``[0, host_tokens)`` of its store."""

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
        decode_ids: their requests.
        prefill: rows to stream back from the arena.
        sealed: segments that this step completes.
        failed: the workers are gone; layers skip the search (the requests end with an error).
    """

    mirror_tokens: Ints
    mirror_pages: Ints
    mirror_offsets: Ints
    decode_tokens: Ints
    decode_rows: Ints
    decode_ids: list[str]
    prefill: list[PrefillRow] = field(default_factory=list)
    chunks: dict[int, "RequestStore"] = field(default_factory=dict)
    """Rows of several queries, with their stores: whose queries are worth statistics."""
    sealed: list[tuple["RequestStore", "Segment"]] = field(default_factory=list)
    failed: bool = False
    device: Any = None
    """The CUDA layer's copy of the index arrays; None on CPU."""


def make_plan(
    metadata: "RetrievalMetadata",
    arena: "Arena",
    epochs: dict[str, int],
    sink_end: int,
    options: Callable[[str], SearchOptions] = lambda request_id: SearchOptions(),
) -> StepPlan:
    """Resolve a batch against the arena: give pages to new tokens and find what lies on the host.

    Args:
        epochs: admission epoch of each request that may need the host; rows of others stay in pages.
        sink_end: first position that the host may own. options: how to search for a request.

    Raises:
        RuntimeError: scheduler and worker disagree on what a request has on the host.
    """
    tokens: list[Ints] = []
    pages: list[Ints] = []
    offsets: list[Ints] = []
    decode_tokens: list[int] = []
    decode_rows: list[tuple[int, ...]] = []
    decode_ids: list[str] = []
    prefill: list[PrefillRow] = []
    chunks: dict[int, RequestStore] = {}
    sealed: list[tuple[RequestStore, Segment]] = []
    assert metadata.request_ids is not None
    for row, request_id in enumerate(metadata.request_ids):
        epoch = epochs.get(request_id)
        length = int(metadata.query_lens[row])
        if epoch is None or length == 0:
            continue
        start, computed = int(metadata.query_start[row]), int(metadata.computed[row])
        store = arena.open(request_id, epoch)
        old, new = max(0, computed - sink_end), max(0, computed + length - sink_end)
        if old > store.tokens:  # the scheduler counts on KV that this admission never had: no answer from noise
            raise RuntimeError(f"retrieval: {request_id}: host tokens {store.tokens} to {old} were never written")
        if new > old:
            arena.grow(store, new)
            row_pages, row_offsets = arena.token_positions(store, old, new)
            tokens.append(np.arange(start + length - (new - old), start + length))
            pages.append(row_pages)
            offsets.append(row_offsets)
            sealed += [(store, segment) for segment in store.written(new)]
        if length > 1:
            chunks[row] = store
        host_tokens = int(metadata.windows[row]) - sink_end
        if host_tokens <= 0:
            continue
        if length == 1:
            how = options(request_id)
            decode_rows.append(
                (
                    store.slot,
                    host_tokens,
                    len(decode_tokens),
                    store.indexed(host_tokens) if how.budget < 1 else 0,
                    round(how.budget * 1e6),
                    how.rerank,
                    int(how.tail),
                )
            )
            decode_tokens.append(start)
            decode_ids.append(request_id)
        else:
            prefill.append(PrefillRow(row, start, start + length, store, host_tokens))

    def joined(parts: list[Any]) -> Ints:
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    return StepPlan(
        joined(tokens),
        joined(pages),
        joined(offsets),
        np.array(decode_tokens, np.int64),
        np.array(decode_rows, np.int64).reshape(-1, ROW_FIELDS),
        decode_ids,
        prefill,
        chunks,
        sealed,
    )
