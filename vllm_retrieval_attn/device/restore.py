# SPDX-License-Identifier: Apache-2.0
"""What a request begins with that another one has computed: its page of copies, its codes, its paged blocks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.sketch import Sketch
    from vllm_retrieval_attn.store.arena import Arena
    from vllm_retrieval_attn.store.requests import RequestStore

Ints = npt.NDArray[np.int64]


def copy_rows(pages: torch.Tensor, source: int, target: int, tokens: int) -> None:
    """Copy the first ``tokens`` tokens of a page, in all layers. pages: (P, L, H, T, 2, d), as the device sees them."""
    pages[target, :, :, :tokens] = pages[source, :, :, :tokens]


def restore_blocks(
    pages: torch.Tensor, caches: Sequence[torch.Tensor], blocks: Sequence[int], where: tuple[Ints, Ints]
) -> None:
    """Fill paged blocks from the arena.

    Args:
        pages: (P, L, H, T, 2, d), as the device sees them. caches: of the L layers, each (blocks, H, B, 2 * d).
        blocks: (n,) to fill. where: (n,) page and offset of each one's first token; B divides T and the offsets.
    """
    if not len(blocks):
        return
    size, device = caches[0].shape[2], caches[0].device
    targets, numbers, places = (
        torch.as_tensor(np.asarray(part, np.int64)).to(device) for part in (blocks, where[0], where[1] // size)
    )
    for layer, cache in enumerate(caches):
        rows = pages[:, layer].unflatten(2, (-1, size)).flatten(4)  # (P, H, T / B, B, 2 * d)
        cache[targets] = rows[numbers, :, places]


def make_codes(
    arena: "Arena", sketch: "Sketch", pages: torch.Tensor, store: "RequestStore", indexes: Sequence[int], tokens: int
) -> None:
    """Code the pages at ``indexes`` of a request of ``tokens`` host tokens from their rows."""
    size = arena.layout.page_tokens
    for index in indexes:
        count = min(size, tokens - index * size)
        targets = np.stack((np.full(count, store.codes[index]), np.arange(count)), axis=1)
        sent = torch.from_numpy(targets).to(pages.device)
        for layer in range(arena.layout.layers):
            keys = pages[store.pages[index], layer, :, :count, 0].transpose(0, 1)
            sketch.encode(layer, store.space, keys, sent)


def copy_codes(sketch: Any, source: int, target: int) -> None:
    """Copy a page of codes."""
    blocks = sketch.pool.view(sketch.geometry.sketch_pages, -1)
    blocks[target] = blocks[source]
