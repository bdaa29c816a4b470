"""The interface of an index over the keys of one KV head: the seam between search and the engine.

A library of its own: arrays in, arrays out, neither vLLM nor Ray.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass
class Touched:
    """What searches read since the counters were last taken.

    Attributes:
        queries: query heads served. keys: keys scored for them. bytes: all bytes read for that.
    """

    queries: int = 0
    keys: int = 0
    bytes: int = 0


class AttentionIndex(ABC):
    """Keys and values of one KV head, searched by the query heads that share it.

    Implementations are safe for concurrent searches; building and appending exclude them.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.touched = Touched()

    @abstractmethod
    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        """Replace the content.

        Args:
            keys, values: (n, d), float32 or float16; may be kept by reference.
            queries: (g, m, d) sampled prompt queries of the g heads that share the KV head; may be empty.
        """

    @abstractmethod
    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Add rows after the present ones; shapes as in :meth:`build`."""

    @abstractmethod
    def search(self, queries: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """The keys of largest inner product.

        Args:
            queries: (g, d).

        Returns:
            (g, k) scaled scores, descending, and (g, k) row numbers.
        """

    @abstractmethod
    def attend(self, queries: Floats) -> tuple[Floats, Floats]:
        """Partial attention over what the index finds.

        Args:
            queries: (g, d).

        Returns:
            (g, d) output and (g,) natural log-sum-exp of the scaled scores; zeros and -inf if empty.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """Rows held."""
