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

from vllm_retrieval_attn.index.choosing import BINS, Found
from vllm_retrieval_attn.index.coordinates import REFERENCE, Moments, coordinates
from vllm_retrieval_attn.index.native import native
from vllm_retrieval_attn.index.packing import BLOCK
from vllm_retrieval_attn.index.scan import CAN_SCAN
from vllm_retrieval_attn.index.search import MOST, Place, find_thresholds, search_scratch, search_shard, turn
from vllm_retrieval_attn.index.shard import SHARD_TOKENS, Shard
from vllm_retrieval_attn.sketch.space import Floats, Space

NO_ADDRESSES: tuple[int, ...] = (0,) * 7


class HeadIndex:
    """Keys are appended in order and never change.

    Args:
        space: of this KV head, without the first axis (sketch/space.py). by_faiss: whether Faiss is to search, also
            where this processor can do without (index/scan.py).

    Attributes:
        size: keys indexed. shards: of them.
        addresses: where compiled code finds what it needs (workers/units.py): of the shards Faiss's objects, codes (0:
            Faiss is to search) and samples, (shards,) int64, means and deviations, (shards, d) float32; the space's
            transform of queries, (d, d) float32, and its mean, (d,) float32.
    """

    def __init__(self, space: Space, by_faiss: bool = False) -> None:
        self._scans = CAN_SCAN and not by_faiss
        parts = (np.ascontiguousarray(part, np.float32) for part in (space.mean, space.keys, space.queries))
        self._space = Space(*parts)
        self._dim = len(space.mean)
        self._turn = np.ascontiguousarray(self._space.keys.T)
        self._moments = Moments(self._dim)
        self.shards: list[Shard] = []
        self.addresses = NO_ADDRESSES
        self._codes = np.zeros(0, np.int64)
        self.size = 0

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def append(self, keys: npt.NDArray[Any]) -> None:
        """Add keys (n, d); n is a multiple of BLOCK, the first time at least REFERENCE."""
        if len(keys) % BLOCK or (not self.shards and len(keys) < REFERENCE):
            raise ValueError(f"keys come in blocks of {BLOCK}, at first at least {REFERENCE}; these are {len(keys)}")
        keys = np.ascontiguousarray(keys, np.float32)
        places: Floats = np.zeros_like(keys)
        coordinates(keys, self._space.mean, self._turn, places)
        known = 0
        if not self.shards:
            known = REFERENCE
            self._moments.add(places[:known])
        done = 0
        while done < len(places):
            if not self.shards or self.shards[-1].size == SHARD_TOKENS:
                self.shards.append(Shard(self._moments.mean.copy(), self._moments.deviation.copy()))
                self._publish()
            last = self.shards[-1]
            part = places[done : done + SHARD_TOKENS - last.size]
            last.append(part)
            self._codes[-1] = last.codes_address if self._scans else 0
            self._moments.add(part[known:])
            known = 0
            done += len(part)
            self.size += len(part)

    def _publish(self) -> None:
        self._codes = np.append(self._codes, 0)
        held = (
            np.array([shard.address for shard in self.shards], np.int64),
            self._codes,
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
        work = search_scratch(group, self._dim, candidates)
        samples = np.array([shard.samples.ctypes.data for shard in self.shards], np.int64)
        floors = np.zeros(group, np.float32)
        for i in range(group):
            turn(self._space.queries, queries[i], turned[i])
            found.shifts[i] = queries[i] @ self._space.mean
        find_thresholds(samples, self.size, candidates, turned, work, floors)
        for number, shard in enumerate(self.shards):
            found.firsts[number], found.sizes[number] = number * SHARD_TOKENS, shard.size
            place = Place(shard.address, int(self._codes[number]), shard.mean, shard.deviation)
            search_shard(native(), place, turned, floors, work, number, found)


def found_for(shards: int, group: int) -> Found:
    """Empty candidates of ``shards`` shards and ``group`` query heads."""
    each, room = (shards, group), group * MOST
    return Found(
        np.zeros((shards, room), np.float32), np.zeros((shards, room), np.int32),
        np.zeros((shards, group + 1), np.int64), np.zeros(each, np.float32), np.zeros(group, np.float32),
        np.zeros(shards, np.int64), np.zeros(shards, np.int64), np.zeros(each, np.float32), np.zeros(each),
        np.zeros(each, np.float32), np.zeros(each, np.float32),
        np.zeros(shards, np.int64), np.zeros(shards, np.float32), np.zeros((shards, BINS), np.int64),
        np.zeros((shards, BINS)), np.zeros(shards),
    )  # fmt: skip
