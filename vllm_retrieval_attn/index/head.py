# SPDX-License-Identifier: Apache-2.0
"""What one KV head of one request has for an index: shards of codes, in the order of its keys.

Keys drift: over 8K tokens their mean and spread move, and the ends of 16 levels cut off what has moved away. So every
shard shifts and scales its coordinates by the mean and deviation of the REFERENCE keys before it (the first shard: of
its own first ones). That is a function of the keys alone, whatever pieces they are appended in: all sums run over whole
blocks in order.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.choosing import Found
from vllm_retrieval_attn.index.native import native
from vllm_retrieval_attn.index.search import MOST, search_shard, threshold, turn
from vllm_retrieval_attn.index.shard import BLOCK, SHARD_TOKENS, Shard
from vllm_retrieval_attn.sketch.space import Doubles, Floats, Space

REFERENCE = 1024
"""Keys whose mean and deviation the next shard takes; the first append must bring as many. Divides a shard."""

NO_ADDRESSES: tuple[int, ...] = (0,) * 6


class _Moments:
    """Mean and deviation of coordinates over the last whole REFERENCE keys."""

    def __init__(self, dim: int) -> None:
        self._sums: Doubles = np.zeros((2, dim))
        self._blocks = 0
        self.mean: Floats = np.zeros(dim, np.float32)
        self.deviation: Floats = np.ones(dim, np.float32)

    def add(self, places: Floats) -> None:
        """Take in coordinates (blocks, BLOCK, d)."""
        sums = np.stack((places.sum(1), np.square(places).sum(1)), axis=1).astype(np.float64)
        for block in sums:  # one after the other, so that pieces make no difference
            self._sums += block
            self._blocks += 1
            if self._blocks * BLOCK == REFERENCE:
                mean, square = self._sums / REFERENCE
                deviation = np.sqrt(np.maximum(square - mean**2, 0))
                self.mean = mean.astype(np.float32)
                self.deviation = np.maximum(deviation, max(1e-4 * deviation.max(), 1e-20)).astype(np.float32)
                self._sums, self._blocks = np.zeros_like(self._sums), 0


class HeadIndex:
    """Keys are appended in order and never change.

    Args:
        space: of this KV head, without the first axis (sketch/space.py).

    Attributes:
        size: keys indexed. shards: of them.
        addresses: where compiled code finds what it needs (workers/units.py): Faiss's objects and the samples of the
            shards, (shards,) int64; means and deviations of the shards, (shards, d) float32; the space's transform of
            queries, (d, d) float32, and its mean, (d,) float32.
    """

    def __init__(self, space: Space) -> None:
        parts = (np.ascontiguousarray(part, np.float32) for part in (space.mean, space.keys, space.queries))
        self._space = Space(*parts)
        self._dim = len(space.mean)
        self._moments = _Moments(self._dim)
        self.shards: list[Shard] = []
        self.addresses = NO_ADDRESSES
        self.size = 0

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def append(self, keys: npt.NDArray[Any]) -> None:
        """Add keys (n, d); n is a multiple of shard.BLOCK, the first time at least REFERENCE."""
        if len(keys) % BLOCK or (not self.shards and len(keys) < REFERENCE):
            raise ValueError(f"keys come in blocks of {BLOCK}, at first at least {REFERENCE}; these are {len(keys)}")
        centred: Any = np.asarray(keys, np.float32) - self._space.mean
        blocks = centred.reshape(-1, BLOCK, self._dim)
        places: Floats = blocks @ self._space.keys.T  # block by block: the same sums however many come at once
        if not self.shards:
            first = REFERENCE // BLOCK
            self._moments.add(places[:first])
        done = 0
        while done < len(places):
            if not self.shards or self.shards[-1].size == SHARD_TOKENS:
                self.shards.append(Shard(self._moments.mean, self._moments.deviation))
                self._publish()
            last = self.shards[-1]
            part = places[done : done + (SHARD_TOKENS - last.size) // BLOCK]
            known = REFERENCE // BLOCK if len(self.shards) == 1 and last.size == 0 else 0
            last.append(part.reshape(-1, self._dim))
            self._moments.add(part[known:])
            done += len(part)
            self.size += len(part) * BLOCK

    def _publish(self) -> None:
        held = (
            np.array([shard.address for shard in self.shards], np.int64),
            np.array([shard.samples.ctypes.data for shard in self.shards], np.int64),
            np.stack([shard.mean for shard in self.shards]),
            np.stack([shard.deviation for shard in self.shards]),
            self._space.queries,
            self._space.mean,
        )
        self._held = held  # arrays live as long as their addresses are known
        self.addresses = tuple(part.ctypes.data for part in held)

    def find(self, queries: Floats, candidates: int, found: Found) -> None:
        """Put the keys that score best for each query head into ``found``; the plain way through index/search.py.

        Args:
            queries: (g, d). candidates: about how many keys of each query head.
        """
        group = len(queries)
        turned = np.zeros((group, self._dim), np.float32)
        best = np.zeros(candidates // 64 + 2, np.float32)
        samples = np.array([shard.samples.ctypes.data for shard in self.shards], np.int64)
        floors = np.zeros(group, np.float32)
        for i in range(group):
            turn(self._space.queries, queries[i], turned[i])
            floors[i] = threshold(samples, self.size, candidates, turned[i], best)
            found.shifts[i] = queries[i] @ self._space.mean
        scaled = np.zeros((group, self._dim + 1), np.float32)
        for number, shard in enumerate(self.shards):
            found.firsts[number], found.sizes[number] = number * SHARD_TOKENS, shard.size
            search_shard(native(), shard.address, shard.mean, shard.deviation, turned, floors, scaled, number, found)


def found_for(shards: int, group: int) -> Found:
    """Empty candidates of ``shards`` shards and ``group`` query heads."""
    room = group * MOST
    return Found(
        np.zeros((shards, room), np.float32), np.zeros((shards, room), np.int32),
        np.zeros((shards, group + 1), np.int64), np.zeros((shards, group), np.float32), np.zeros(group, np.float32),
        *np.zeros((2, shards), np.int64),
    )  # fmt: skip
