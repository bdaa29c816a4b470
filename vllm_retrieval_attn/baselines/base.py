# SPDX-License-Identifier: Apache-2.0
"""The interface of an index over the keys of one KV head: the seam between search and the engine.

A library of its own: arrays in, arrays out, neither vLLM nor Ray.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass
class Touched:
    """What searches read since the counters were last taken.

    Attributes:
        queries: query heads served. keys: keys scored for them, by whatever means, summed over queries.
        bytes: all bytes read for that, summed over queries as if none had shared a read: centroids, codes, graph
            edges, keys scored exactly, values attended.
    """

    queries: int = 0
    keys: int = 0
    bytes: int = 0


class AttentionIndex(ABC):
    """Keys and values of one KV head, searched by the query heads that share it.

    Implementations are safe for concurrent searches; building and appending exclude them.

    Args:
        scale: softmax scale. dim: head size d. dtype: element type of stored rows (float16 or float32).
    """

    kind: ClassVar[str]
    """Name in the configuration, the command line and tables."""

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> None:
        self.scale = scale
        self.dim = dim
        self.touched = Touched()
        self.rows: npt.NDArray[Any] = np.empty((0, 2, dim), dtype)
        """(n, 2, d): each key with its value."""

    @abstractmethod
    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        """Replace the content.

        Args:
            keys, values: (n, d).
            queries: (g, m, d) sampled prompt queries of the g heads that share the KV head; may be empty.
        """

    @abstractmethod
    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Add rows after the present ones; shapes as in :meth:`build`. They are found from then on."""

    @abstractmethod
    def search(self, queries: Floats, k: int, budget: float = 1.0) -> tuple[Floats, Rows]:
        """The keys of largest inner product among those that the budget lets the index look at.

        Args:
            queries: (g, d). k: how many. budget: share of keys to score, in (0, 1]; 1 is exact.

        Returns:
            (g, k) scaled scores, descending, and (g, k) row numbers; -inf and -1 where fewer were found.
        """

    @abstractmethod
    def attend(self, queries: Floats, budget: float = 1.0) -> tuple[Floats, Floats]:
        """Partial attention over what the index finds.

        Args:
            queries: (g, d). budget: as in :meth:`search`; 1 equals exact attention over all rows.

        Returns:
            (g, d) output and (g,) natural log-sum-exp of the scaled scores; zeros and -inf if empty.
        """

    @abstractmethod
    def attended(self, queries: Floats, budget: float = 1.0) -> list[Rows]:
        """Rows that :meth:`attend` gives their exact weight, one array a query. Not counted in ``touched``."""

    @property
    def size(self) -> int:
        """Rows held."""
        return int(self.rows.shape[0])

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes held beside the rows themselves."""

    def take_touched(self) -> Touched:
        """The counters since the last call, which start again from zero."""
        touched, self.touched = self.touched, Touched()
        return touched
