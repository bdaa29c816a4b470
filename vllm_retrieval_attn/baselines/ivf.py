# SPDX-License-Identifier: Apache-2.0
"""`ivf`: Faiss's inverted lists with inner product, as Faiss sets them up itself."""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import Floats, Rows
from vllm_retrieval_attn.baselines.candidates import CALIBRATION_QUERIES, CandidateIndex, Cost

_faiss: Any = faiss  # its stubs lack some keyword arguments
ROWS_PER_LIST = 32
"""Reading all centroids is then 3 % of reading all keys."""


class IvfIndex(CandidateIndex):
    """IndexIVFFlat (spherical k-means, 10 iterations): attend over all keys in the lists of the nearest centroids.

    The budget becomes the most lists whose keys, on average over prompt queries (keys, if there are none), are within
    it; at least one. Reads of centroids are counted as bytes (as if kept in float16), not as keys.

    Appended rows go to the list of their nearest centroid; the lists are trained anew when the rows have doubled.
    """

    kind = "ivf"

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> None:
        super().__init__(scale, dim, dtype)
        self._ivf: Any = None
        self._order: npt.NDArray[np.int64] = np.empty((0, 0), np.int64)
        """(s, nlist) lists in the order in which each calibration query probes them."""
        self._sizes: npt.NDArray[np.int64] = np.empty(0, np.int64)
        """(nlist,) rows of each list."""

    @property
    def index_bytes(self) -> int:
        """List ids and centroids as Faiss holds them (int64, float32), and what translates budgets.

        Faiss's own float32 copy of the keys is left out: without it the lists would hold the rows themselves.
        """
        if not self.built:
            return 0
        return 8 * self.size + 4 * self._ivf.nlist * self.dim + self._order.nbytes + self._sizes.nbytes

    def _make(self) -> None:
        nlist = max(1, self.size // ROWS_PER_LIST)
        self._ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, nlist, faiss.METRIC_INNER_PRODUCT)
        self._ivf.cp.min_points_per_centroid = 1  # only silences a warning that 39 are advised
        keys = self._keys(0)
        self._ivf.train(keys)
        self._ivf.add(keys)
        self._order = self._ivf.quantizer.search(self._guides(CALIBRATION_QUERIES), nlist)[1]
        self._measure()

    def _extend(self, first: int) -> None:
        if self.size > 2 * self.built:
            self._remake()
            return
        self._ivf.add(self._keys(first))
        self._measure()

    def _measure(self) -> None:
        lists = self._ivf.invlists
        self._sizes = np.array([lists.list_size(i) for i in range(self._ivf.nlist)], np.int64)

    def _probed(self, queries: Floats, budget: float) -> tuple[npt.NDArray[np.int64], Cost]:
        """(g, nprobe) lists to scan."""
        expected = np.cumsum(self._sizes[self._order], axis=1).mean(axis=0)
        nprobe = max(1, int(np.searchsorted(expected, budget * self.size, side="right")))
        _, lists = self._ivf.quantizer.search(queries, nprobe)
        centroids = len(queries) * self._ivf.nlist * self.dim * 2
        return lists, Cost(int(self._sizes[lists].sum()), centroids)

    def _best(self, queries: Floats, k: int, budget: float) -> tuple[Floats, Rows, Cost]:
        lists, cost = self._probed(queries, budget)
        # Ranks the centroids again: search_preassigned takes nprobe from the index, which threads share.
        scores, rows = self._ivf.search(queries, k, params=_faiss.SearchParametersIVF(nprobe=lists.shape[1]))
        scores[rows < 0] = -np.inf
        return scores, rows, cost

    def _candidates(self, queries: Floats, budget: float) -> tuple[list[Rows], Cost]:
        lists, cost = self._probed(queries, budget)
        return [np.concatenate([self._members(int(i)) for i in probed]) for probed in lists], cost

    def _members(self, number: int) -> Rows:
        size = int(self._sizes[number])
        return faiss.rev_swig_ptr(self._ivf.invlists.get_ids(number), size) if size else np.empty(0, np.int64)
