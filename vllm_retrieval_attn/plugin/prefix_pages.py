# SPDX-License-Identifier: Apache-2.0
"""The worker's half of reuse: pages kept at the scheduler's word, and requests that begin with them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_retrieval_attn.device.restore import copy_codes, copy_rows, make_codes, restore_blocks
from vllm_retrieval_attn.plugin.messages import Opening

if TYPE_CHECKING:
    from vllm_retrieval_attn.core.ownership import Split
    from vllm_retrieval_attn.store.arena import Arena
    from vllm_retrieval_attn.store.requests import RequestStore


class PrefixPages:
    """Does what StepMessage says of prefixes.

    Args:
        arena, sketch: of the rank; the sketch may be None. split: where tokens are divided. names: of layers, in order.
        pages: the arena's, as the device sees them; asked for when memory is pinned.
    """

    def __init__(
        self, arena: "Arena", sketch: Any, split: "Split", names: Sequence[str], pages: Callable[[], torch.Tensor]
    ) -> None:
        self._arena, self._sketch, self._split, self._names, self._pages = arena, sketch, split, names, pages
        self._later: list[tuple[str, int, int, int]] = []

    def keep(self, kept: Iterable[tuple[str, int, int, int]]) -> None:
        """Have pages kept; those that their request gets in this step, once it is over. See StepMessage.kept."""
        self._later = [one for one in kept if not self._keep(*one)]

    def step_ends(self) -> None:
        """Every request has the pages of this step.

        Raises:
            RuntimeError: one has not, which the scheduler counts on.
        """
        for one in self._later:
            if not self._keep(*one):
                raise RuntimeError(f"retrieval: {one[0]} has no page {one[2]} to keep")
        self._later = []

    def _keep(self, request_id: str, epoch: int, index: int, number: int) -> bool:
        store = self._arena.requests.get(request_id)
        if store is None or store.epoch != epoch or index >= len(store.pages):
            return False
        self._arena.keep(store, index, number)
        return True

    def open(self, request_id: str, epoch: int, opening: Opening, caches: Mapping[str, torch.Tensor]) -> None:
        """A request is admitted: it takes what others have computed of its prompt. caches: paged K and V by layer."""
        arena = self._arena
        store = arena.open(request_id, epoch, opening.longest)
        store.sink = opening.sink
        match = opening.match
        if not match.tokens:
            return
        uncoded = arena.adopt(store, match.pages)
        tokens = match.tokens - arena.sinks
        arena.grow(store, tokens)
        if match.source is not None:
            source = arena.kept[match.source]
            copy_rows(self._pages(), source.page, store.pages[-1], match.blocks * self._split.block_size)
            if source.code is not None and source.space == store.space and store.sketched:
                copy_codes(self._sketch, source.code, store.codes[-1])
            else:
                uncoded.append(len(store.pages) - 1)
        if store.sketched:
            make_codes(arena, self._sketch, self._pages(), store, uncoded, tokens)
        store.written(tokens)
        self._restore(store, opening, [caches[name] for name in self._names])

    def _restore(self, store: "RequestStore", opening: Opening, caches: Sequence[torch.Tensor]) -> None:
        """Fill the paged blocks of the sinks and of the window."""
        arena, block, sinks = self._arena, self._split.block_size, self._arena.sinks
        if opening.match.sink >= 0:
            where = arena.sink_places(opening.match.sink, 0, sinks)
            restore_blocks(self._pages(), caches, opening.blocks[0], (where[0][::block], where[1][::block]))
        first = self._split.window_start(opening.match.tokens) - sinks
        where = arena.token_positions(store, first, opening.match.tokens - sinks)
        restore_blocks(self._pages(), caches, opening.blocks[1], (where[0][::block], where[1][::block]))
