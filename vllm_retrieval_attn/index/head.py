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
from vllm_retrieval_attn.index.rows import jit
from vllm_retrieval_attn.index.shard import BLOCK, SHARD_TOKENS, Shard
from vllm_retrieval_attn.sketch.space import Doubles, Floats, Space

REFERENCE = 1024
"""Keys whose mean and deviation the next shard takes; the first append must bring as many. Divides a shard."""
SLACK = 1.5
"""A shard gives so many times its share of the candidates: the best keys do not lie evenly."""
MOST = 1024
"""Candidates that a shard is asked for at most: beyond, Faiss takes more than twice as long."""


@jit
def wanted(size: int, keys: int, candidates: int) -> int:
    """How many of ``candidates`` for ``keys`` keys a shard of ``size`` keys is asked for."""
    return min(size, MOST, int(candidates * min(1.0, SLACK * size / keys)) + 1)


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
        addresses: where compiled code finds what it needs (workers/units.py): Faiss's objects, (shards,) int64; means
            and deviations of the shards, (shards, d) float32; the space's transform of queries, (d, d) float32, and its
            mean, (d,) float32.
    """

    def __init__(self, space: Space) -> None:
        parts = (np.ascontiguousarray(part, np.float32) for part in (space.mean, space.keys, space.queries))
        self._space = Space(*parts)
        self._dim = len(space.mean)
        self._moments = _Moments(self._dim)
        self.shards: list[Shard] = []
        self.addresses = (0, 0, 0, 0, 0)
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
            np.stack([shard.mean for shard in self.shards]),
            np.stack([shard.deviation for shard in self.shards]),
            self._space.queries,
            self._space.mean,
        )
        self._held = held  # arrays live as long as their addresses are known
        self.addresses = tuple(part.ctypes.data for part in held)  # type: ignore[assignment]  # five of them

    def turn(self, queries: Floats) -> tuple[Floats, Floats]:
        """(g, d) queries among the coordinates, and (g,) what the space's mean adds to every inner product."""
        return queries @ self._space.queries.T, queries @ self._space.mean

    def search(self, number: int, turned: Floats, shift: Floats, candidates: int, found: Found) -> int:
        """Put the best keys of a shard for each query head into ``found``; returns how many of each.

        Args:
            turned, shift: as :meth:`turn` gives them.
        """
        shard, group = self.shards[number], len(turned)
        k = wanted(shard.size, self.size, candidates)
        found.counts[number], found.firsts[number], found.sizes[number] = k, number * SHARD_TOKENS, shard.size
        found.shifts[number] = shift + turned @ shard.mean
        shard.search(turned * shard.deviation, *best_of(found, number, group))
        return k


def best_of(found: Found, shard: int, group: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """(g, k) scores and (g, k) ids of a shard's candidates, as views."""
    k = int(found.counts[shard])
    return found.scores[shard, : group * k].reshape(group, k), found.ids[shard, : group * k].reshape(group, k)


def found_for(shards: int, group: int, k: int) -> Found:
    """Empty candidates of ``shards`` shards and ``group`` query heads, up to ``k`` of each."""
    scores, ids = np.zeros((shards, group * k), np.float32), np.zeros((shards, group * k), np.int64)
    return Found(scores, ids, np.zeros((shards, group), np.float32), *np.zeros((3, shards), np.int64))
