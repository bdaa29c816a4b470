"""`flat`: exact search and exact attention over every key. What every other index is compared with.

The served engine runs the same kernel (index/kernels.py) over arena pages; see workers/ring.py.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.base import AttentionIndex, Floats, Rows
from vllm_retrieval_attn.index.kernels import FLOAT16, FLOAT32, attend_rows, scratch


def attend_exactly(rows: npt.NDArray[Any], queries: Floats, scale: float) -> tuple[Floats, Floats]:
    """Exact attention of ``queries`` (g, d) over ``rows`` (2, n, d), float16 or float32.

    Returns:
        (g, d) output and (g,) natural log-sum-exp; zeros and -inf if there are no rows.
    """
    g, dim = queries.shape
    n = rows.shape[1]
    out = np.zeros((g, dim), np.float32)
    lse = np.full(g, -np.inf, np.float32)
    if not n:
        return out, lse
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    top, total = lse.copy(), np.zeros(g, np.float32)
    kind = FLOAT16 if rows.itemsize == 2 else FLOAT32
    scaled = np.ascontiguousarray(queries, np.float32) * np.float32(scale)
    attend_rows(
        flat.view(np.uint16), flat.view(np.float32), kind, 0, n * dim, n, scaled, out, top, total, *scratch(g, dim)
    )
    return out / total[:, None], top + np.log(total)


class FlatIndex(AttentionIndex):
    """Brute force, with Faiss for the search and our scan kernel for attention."""

    kind = "flat"

    @property
    def index_bytes(self) -> int:
        return 0

    def build(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], queries: Floats) -> None:
        self.rows = np.stack((keys, values)).astype(self.rows.dtype)

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        self.rows = np.concatenate((self.rows, np.stack((keys, values)).astype(self.rows.dtype)), axis=1)

    def search(self, queries: Floats, k: int, budget: float = 1.0) -> tuple[Floats, Rows]:
        keys = np.ascontiguousarray(self.rows[0], np.float32)
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
