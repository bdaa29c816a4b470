# SPDX-License-Identifier: Apache-2.0
"""Who owns a token: the paged KV cache or the host arena.

Scheduler and worker derive the boundary through :class:`Split` and nobody stores it, so
the two can not disagree. With ``S`` sink tokens, window ``W``, block size ``B`` and ``R`` resident tokens,
a row that has ``c`` computed tokens at schedule time is split into

    paged [0, S) | host [S, W0) | paged [W0, ...)      W0 = max(S, floor((c - W) / B) * B), or S while c <= R

``S`` is rounded up to whole blocks first, so that both boundaries fall on block edges.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INDEX_LAG = 512
"""A token is searched through the index from so many tokens later on; until then it is read exactly. So there is time
to code it, and rows never depend on how far that is."""
INDEX_BLOCK = 32
"""Tokens go into the index in whole blocks (index/shard.py)."""
INDEX_LEAST = 1024
"""Fewer host tokens than this are read exactly; a space without statistics takes its own from them."""


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


def sink_end(sink_tokens: int, block_size: int) -> int:
    """First token position after the sink region: ``sink_tokens`` in whole blocks."""
    return cdiv(sink_tokens, block_size) * block_size


@dataclass(frozen=True)
class Split:
    """Where a request's tokens are divided.

    Attributes:
        sink_tokens, window_tokens, resident_tokens: ``S`` before rounding, ``W`` and ``R``. block_size: ``B``.
    """

    sink_tokens: int
    window_tokens: int
    resident_tokens: int
    block_size: int

    @property
    def sink_end(self) -> int:
        """``S``, in whole blocks."""
        return sink_end(self.sink_tokens, self.block_size)

    def window_start(self, computed: int) -> int:
        """``W0`` of a row with ``computed`` tokens.

        Never decreases as ``computed`` grows, so a block that the scheduler freed on an older
        (smaller) count is never needed again.
        """
        if computed <= self.resident_tokens:
            return self.sink_end
        return max(self.sink_end, (computed - self.window_tokens) // self.block_size * self.block_size)

    def window_starts(self, computed: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """:meth:`window_start` of several rows, (R,)."""
        aligned = (computed - self.window_tokens) // self.block_size * self.block_size
        starts: npt.NDArray[Any] = np.maximum(
            self.sink_end, np.where(computed <= self.resident_tokens, self.sink_end, aligned)
        )
        return starts

    def blocks_bound(self, in_flight_tokens: int) -> int:
        """Most blocks that a live request holds in the paged cache, whatever its length.

        ``in_flight_tokens`` (tokens scheduled and not yet settled) may start and end inside a
        block, and so may the window: one block more than the two lengths alone.
        """
        block = self.block_size
        kept = max(cdiv(self.sink_tokens, block) + cdiv(self.window_tokens, block), cdiv(self.resident_tokens, block))
        return kept + cdiv(in_flight_tokens, block) + 1

    def never_leaves_pages(self, max_tokens: int) -> bool:
        """Whether a request of at most ``max_tokens`` tokens never has a token on the host side."""
        return self.window_start(max(0, max_tokens - 1)) == self.sink_end

    def indexed_tokens(self, computed: int) -> int:
        """Host tokens ``[0, n)`` of a row with ``computed`` tokens that are searched through the index."""
        host = min(self.window_start(computed), computed - INDEX_LAG) - self.sink_end
        return host // INDEX_BLOCK * INDEX_BLOCK if host >= INDEX_LEAST else 0
