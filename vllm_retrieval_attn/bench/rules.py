# SPDX-License-Identifier: Apache-2.0
"""The rule that the product chooses rows by (sketch/sampling.py), on one captured KV head.

Over all codes, or as the CPU workers do it, among the candidates of a search.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.bench.capture_file import Head
from vllm_retrieval_attn.core.ownership import INDEX_BLOCK, INDEX_LEAST
from vllm_retrieval_attn.index.choosing import choice_scratch, choose
from vllm_retrieval_attn.index.head import HeadIndex, found_for
from vllm_retrieval_attn.index.shard import SHARD_TOKENS
from vllm_retrieval_attn.sketch.codes import encode, score
from vllm_retrieval_attn.sketch.sampling import Limits, Rows, seed_of, weights_of
from vllm_retrieval_attn.sketch.sampling import choose as choose_plainly
from vllm_retrieval_attn.sketch.space import Floats, Space, balanced_for, rotated


def space_of(head: Head, learned: bool = True) -> Space:
    """The space of a captured head, without the first axis; learned from the whole prompt, as in the engine, but for
    queries of which every so many are captured."""
    keys = head.K[head.sink : head.bound]
    if not learned:
        return rotated(1, keys.shape[1]).one(0)
    asked = head.Qprompt_strided if head.Qprompt_strided.shape[1] else head.Qprompt
    return balanced_for(keys, asked.reshape(-1, keys.shape[1])).one(0)


class Rule(ABC):
    """Chooses rows of one KV head.

    Args:
        head: the capture. space: see :func:`space_of`.
    """

    via: str

    def __init__(self, head: Head, space: Space) -> None:
        self._space = space
        self.scale = np.float32(head.scale)
        self.keys: npt.NDArray[Any] = head.K[head.sink : head.bound]

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes of codes."""

    @abstractmethod
    def choose(self, queries: Floats, outside: Floats, limits: Limits, position: int) -> tuple[Rows, Floats]:
        """Rows to read and log pi of each, (r,).

        Args:
            queries: (g, d). outside: (g,) LSE over sinks and window. position: hashed into the draw.
        """


class SketchRule(Rule):
    """Estimates from the 4-bit codes of all keys (sketch/codes.py)."""

    via = "sketch"

    def __init__(self, head: Head, space: Space) -> None:
        super().__init__(head, space)
        self._codes, self._steps = encode(self.keys, space)

    @property
    def index_bytes(self) -> int:
        return self._codes.nbytes + self._steps.nbytes

    def choose(self, queries: Floats, outside: Floats, limits: Limits, position: int) -> tuple[Rows, Floats]:
        scores = score(queries, self._codes, self._steps, self._space, float(self.scale))
        return choose_plainly(weights_of(scores, outside), limits, seed_of(0, position, 0, 0))


class CandidatesRule(Rule):
    """As served on the CPU: the best candidates of every shard, the rest as one class; a remainder is read exactly."""

    def __init__(self, head: Head, space: Space, candidates: int, by_faiss: bool) -> None:
        super().__init__(head, space)
        self.via = "faiss" if by_faiss else "vnni"
        n = len(self.keys)
        self._covered = n // INDEX_BLOCK * INDEX_BLOCK if n >= INDEX_LEAST else 0
        self._candidates = candidates
        self._index = HeadIndex(space, by_faiss)
        group = head.q.shape[0]
        if self._covered:
            self._index.append(self.keys[: self._covered])
            shards = len(self._index.shards)
            self._found = found_for(shards, group)
            self._work = choice_scratch(SHARD_TOKENS)

    @property
    def index_bytes(self) -> int:
        return self._index.nbytes

    def choose(self, queries: Floats, outside: Floats, limits: Limits, position: int) -> tuple[Rows, Floats]:
        tail = np.arange(self._covered, len(self.keys))
        if not self._covered:
            return tail, np.zeros(len(tail), np.float32)
        self._index.find(queries, self._candidates, self._found)
        seed = np.uint64(seed_of(0, position, 0, 0))
        rows, log_pi = choose(self._found, float(self.scale), outside, limits, seed, self._work)
        return np.concatenate((rows, tail)), np.concatenate((log_pi, np.zeros_like(tail, np.float32)))
