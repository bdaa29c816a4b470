# SPDX-License-Identifier: Apache-2.0
"""`flat`: exact search and exact attention over every key. What every other index is compared with.

The served engine runs the same kernel (index/rows.py) over arena pages; see workers/units.py.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import AttentionIndex, Floats, Rows
from vllm_retrieval_attn.index.rows import attend_exactly


class FlatIndex(AttentionIndex):
    """Brute force, with Faiss for the search and our scan kernel for attention."""

    kind = "flat"

    @property
    def index_bytes(self) -> int:
        return 0

    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        self.rows = np.stack((keys, values), axis=1).astype(self.rows.dtype)

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        self.rows = np.concatenate((self.rows, np.stack((keys, values), axis=1).astype(self.rows.dtype)))

    def search(self, queries: Floats, k: int, budget: float = 1.0) -> tuple[Floats, Rows]:
        keys = np.ascontiguousarray(self.rows[:, 0], np.float32)
        scores, found = faiss.knn(np.ascontiguousarray(queries), keys, k, metric=faiss.METRIC_INNER_PRODUCT)
        self._count(len(queries))
        return scores * np.float32(self.scale), found

    def attend(self, queries: Floats, budget: float = 1.0) -> tuple[Floats, Floats]:
        self._count(len(queries))
        return attend_exactly(self.rows, queries, self.scale)

    def attended(self, queries: Floats, budget: float = 1.0) -> list[Rows]:
        return [np.arange(self.size)] * len(queries)

    def _count(self, queries: int) -> None:
        self.touched.queries += queries
        self.touched.keys += queries * self.size
        self.touched.bytes += queries * self.rows.nbytes
