"""`flat`: exact search and exact attention over every key. What every other index is compared with.

The served engine runs the same kernel (index/kernels.py) over arena pages; see workers/ring.py.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.base import AttentionIndex, Floats
from vllm_retrieval_attn.index.kernels import FLOAT16, FLOAT32, attend_rows, scratch


class FlatIndex(AttentionIndex):
    """Brute force, with Faiss for the search and our scan kernel for attention."""

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float32) -> None:
        super().__init__(scale)
        self._rows = np.empty((2, 0, dim), dtype)

    @property
    def size(self) -> int:
        return int(self._rows.shape[1])

    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        self._rows = np.stack((keys, values)).astype(self._rows.dtype)

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        self._rows = np.concatenate((self._rows, np.stack((keys, values)).astype(self._rows.dtype)), axis=1)

    def search(self, queries: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        keys = np.ascontiguousarray(self._rows[0], np.float32)
        scores, rows = faiss.knn(np.ascontiguousarray(queries), keys, k, metric=faiss.METRIC_INNER_PRODUCT)
        self._count(len(queries))
        return scores * np.float32(self.scale), rows

    def attend(self, queries: Floats) -> tuple[Floats, Floats]:
        g, dim = queries.shape
        out = np.zeros((g, dim), np.float32)
        lse = np.full(g, -np.inf, np.float32)
        if not self.size:
            return out, lse
        flat = self._rows.reshape(-1).view(np.uint8)
        top, total = lse.copy(), np.zeros(g, np.float32)
        kind = FLOAT16 if self._rows.itemsize == 2 else FLOAT32
        words = flat.view(np.float32)
        attend_rows(
            flat.view(np.uint16), words, kind, 0, self.size * dim, self.size, queries * np.float32(self.scale), out,
            top, total, *scratch(g, dim),
        )  # fmt: skip
        self._count(g)
        return out / total[:, None], top + np.log(total)

    def _count(self, queries: int) -> None:
        self.touched.queries += queries
        self.touched.keys += queries * self.size
        self.touched.bytes += self._rows.nbytes
