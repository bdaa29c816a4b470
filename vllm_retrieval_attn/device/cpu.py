# SPDX-License-Identifier: Apache-2.0
"""The attention layer on CPU: paged part and prefill with PyTorch's kernel, decode search in the actors."""

from typing import TYPE_CHECKING

import torch

from vllm_retrieval_attn.device.merge import merge_partials

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import HostRow, StepPlan
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.plugin.worker import RetrievalWorker


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of one row.

    Args:
        query: (n, heads, d). keys, values: (kv_heads, m, d). causal: query i sees keys up to i (n == m).

    Returns:
        (n, heads, d) float32 output and (n, heads) float32 natural log-sum-exp.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1)[None], keys[None], values[None], 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1).float()


def write_pages(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write K and V of a batch to the paged cache, (blocks, kv_heads, block, 2 * d)."""
    block, dim = kv_cache.shape[2], key.shape[-1]
    where, offset = slots // block, slots % block
    kv_cache[where, :, offset, :dim] = key
    kv_cache[where, :, offset, dim:] = value


def gather_resident(kv_cache: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first ``length`` tokens of a compact block table, each (kv_heads, length, d)."""
    _, kv_heads, block, width = kv_cache.shape
    blocks = table[: -(-length // block)].long()
    rows = kv_cache.index_select(0, blocks).transpose(0, 1).reshape(kv_heads, -1, width)[:, :length]
    return rows[..., : width // 2], rows[..., width // 2 :]


class CpuLayer:
    """Attention of one retrieval layer on a CPU device."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def forward(
        self,
        worker: "RetrievalWorker | None",
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: "RetrievalMetadata",
        plan: "StepPlan | None",
        output: torch.Tensor,
    ) -> None:
        """One batch: write pages, mirror, attend to decode rows' pages, post the search, prefill meanwhile, merge.

        Args:
            worker: host side, None with index ``none``. layer: its index in the arena.
            query, output: (T, heads, d). key, value: (T, kv_heads, d).
            plan: None where the batch has no host work (dummy run, index ``none``).
        """
        write_pages(kv_cache, key, value, metadata.slot_mapping)
        if plan is not None and worker is not None:
            self._mirror(worker, layer, key, value, plan)
            if worker.space is not None:
                worker.space.add(layer, key, query, plan)
        spans = [(row, *map(int, metadata.query_start[row : row + 2])) for row in range(len(metadata.query_lens))]
        searched = self._searched_rows(plan)
        paged = torch.empty(len(searched), *query.shape[1:])
        paged_lse = torch.empty(len(searched), query.shape[1])
        for row, first, last in spans:
            if last - first == 1:
                where = metadata.resident_table[row], int(metadata.resident_lens[row])
                out, lse = attend(query[first:last], *gather_resident(kv_cache, *where), self._scale)
                output[first] = out[0].to(output.dtype)
                if first in searched:
                    paged[searched[first]], paged_lse[searched[first]] = out[0], lse[0]
        if searched:
            assert plan is not None
            assert worker is not None
            worker.arena.queries[: len(searched)] = query[torch.from_numpy(plan.decode_tokens)]
            worker.arena.outside[: len(searched)] = paged_lse
            worker.answers.post(layer, plan)
        streamed = {item.row: item for item in plan.prefill} if plan is not None else {}
        for row, first, last in spans:
            if last - first > 1:
                out = self._prefill(worker, layer, (row, first, last), query, key, value, kv_cache, metadata, streamed)
                output[first:last] = out.to(output.dtype)
        if searched:
            assert plan is not None
            assert worker is not None
            self._merge_search(worker, layer, plan, paged, paged_lse, output)

    @staticmethod
    def _searched_rows(plan: "StepPlan | None") -> dict[int, int]:
        """Batch token -> row of the message."""
        if plan is None or not plan.searched:
            return {}
        return {int(token): i for i, token in enumerate(plan.decode_tokens)}

    def _prefill(
        self,
        worker: "RetrievalWorker | None",
        layer: int,
        span: tuple[int, int, int],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: "RetrievalMetadata",
        streamed: "dict[int, HostRow]",
    ) -> torch.Tensor:
        """Exact attention of one chunk: (n, heads, d) float32. ``span``: its row and batch tokens."""
        row, first, last = span
        q = query[first:last]
        # The chunk itself is causal; everything before it is seen by all of its queries.
        keys, values = (tensor[first:last].transpose(0, 1) for tensor in (key, value))
        out, lse = attend(q, keys, values, self._scale, causal=True)
        earlier = int(metadata.resident_lens[row]) - (last - first)
        if earlier > 0:
            before = gather_resident(kv_cache, metadata.resident_table[row], earlier)
            out, lse = merge_partials(out, lse, *attend(q, *before, self._scale))
        if row in streamed:
            assert worker is not None
            out, lse = self._stream(worker, layer, q, streamed[row], out, lse)
        return out

    def _mirror(
        self, worker: "RetrievalWorker", layer: int, key: torch.Tensor, value: torch.Tensor, plan: "StepPlan"
    ) -> None:
        tokens, pages, offsets = (
            torch.from_numpy(array) for array in (plan.mirror_tokens, plan.mirror_pages, plan.mirror_offsets)
        )
        arena = worker.arena.pages
        arena[pages, layer, :, offsets, 0] = key[tokens]
        arena[pages, layer, :, offsets, 1] = value[tokens]

    def _stream(
        self,
        worker: "RetrievalWorker",
        layer: int,
        q: torch.Tensor,
        item: "HostRow",
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact attention of a prefill chunk over its host tokens, page by page where they lie."""
        left = item.host_tokens
        for page in item.store.pages:
            if left <= 0:
                break
            rows = worker.arena.pages[page, layer, :, : min(left, worker.arena.layout.page_tokens)]
            more = attend(q, rows[:, :, 0], rows[:, :, 1], self._scale)
            out, lse = merge_partials(out, lse, *more)
            left -= worker.arena.layout.page_tokens
        return out, lse

    def _merge_search(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        paged: torch.Tensor,
        paged_lse: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        found, found_lse = torch.empty_like(paged), torch.empty_like(paged_lse)
        if not worker.answers.collect(plan, found.numpy(), found_lse.numpy()):
            self._attend_here(worker, layer, plan, paged, paged_lse, output)
            return
        if worker.sampler is not None and worker.sampler.active:
            worker.sampler.record(
                layer, worker.arena.queries, found.numpy(), found_lse.numpy(), paged.numpy(), paged_lse.numpy()
            )
        merged, _ = merge_partials(paged, paged_lse, found, found_lse)
        output[torch.from_numpy(plan.decode_tokens)] = merged.to(output.dtype)

    def _attend_here(
        self,
        worker: "RetrievalWorker",
        layer: int,
        plan: "StepPlan",
        paged: torch.Tensor,
        paged_lse: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """What the workers should have done, over all host tokens of the rows."""
        for number, item in enumerate(plan.decode_hosts):
            q, mine = worker.arena.queries[number : number + 1], slice(number, number + 1)
            out, _ = self._stream(worker, layer, q, item, paged[mine], paged_lse[mine])
            output[item.first] = out[0].to(output.dtype)
