# SPDX-License-Identifier: Apache-2.0
"""Learning the model's space (sketch/space.py) from the first prompt that is long enough."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.sketch.space import Space, balanced

LEARN_TOKENS = 4096
"""Fewest tokens of a prompt that the space is learned from. All that it has are taken: rotary embeddings turn keys and
queries on with every token, so what a prompt's beginning tells is not true of its end (docs/index-study.md)."""


@dataclass
class _Sums:
    """Of one layer: reference (kv_heads, d), then sums over tokens of keys less the reference, of their outer products,
    and of those of queries."""

    reference: torch.Tensor
    keys: torch.Tensor
    outer: torch.Tensor
    queries: torch.Tensor


class SpaceLearner:
    """Sums over the tokens of one request at a time, until one brings enough.

    Args:
        layers: how many there are.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._request: str | None = None
        self._tokens = 0
        self._sums: dict[int, _Sums] = {}
        self._done: Any = None

    def begin(self, request_id: str, tokens: int) -> None:
        """A step brings ``tokens`` new tokens of a request; another one than before starts anew."""
        if request_id != self._request:
            self._request, self._tokens, self._sums = request_id, 0, {}
        self._tokens += tokens

    def add(self, layer: int, keys: torch.Tensor, queries: torch.Tensor) -> None:
        """Take in the tokens of this step in one layer.

        Args:
            keys: (n, kv_heads, d). queries: (n, heads, d).
        """
        n, kv_heads, dim = keys.shape
        rows = keys.float().transpose(0, 1)  # (kv_heads, n, d)
        asked = queries.float().view(n, kv_heads, -1, dim).permute(1, 0, 2, 3).flatten(1, 2)
        if layer not in self._sums:
            zero = torch.zeros(kv_heads, dim, dim, device=keys.device)
            self._sums[layer] = _Sums(
                rows.mean(1), torch.zeros_like(zero[0, :1]).expand(kv_heads, dim).clone(), zero, zero.clone()
            )
        sums = self._sums[layer]
        rows = rows - sums.reference[:, None]
        sums.keys += rows.sum(1)
        sums.outer += rows.mT @ rows
        sums.queries += asked.mT @ asked

    @property
    def request(self) -> str | None:
        """The request that is learned from."""
        return self._request

    @property
    def tokens(self) -> int:
        """Tokens of it so far."""
        return self._tokens

    @property
    def enough(self) -> bool:
        """Whether the sums are of enough tokens in every layer."""
        return self._tokens >= LEARN_TOKENS and len(self._sums) == self._layers

    def close(self) -> None:
        """Nothing will be added any more, so that another thread may ask for :meth:`space`."""
        if self._sums[0].keys.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def space(self) -> Space:
        """The balanced space of all layers' KV heads, layer by layer.

        Raises:
            ValueError: keys or queries that are not finite.
        """
        if self._done is not None:
            self._done.synchronize()
        ordered = [self._sums[layer] for layer in range(self._layers)]

        def stacked(name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
            return torch.cat([getattr(sums, name) for sums in ordered]).cpu().double().numpy()

        moved = stacked("keys") / self._tokens
        covariance = stacked("outer") / self._tokens - moved[:, :, None] * moved[:, None, :]
        return balanced(stacked("reference") + moved, covariance, stacked("queries") / self._tokens)
