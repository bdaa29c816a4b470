# SPDX-License-Identifier: Apache-2.0
"""`hnsw`: Faiss's hierarchical navigable small world graph (arXiv 1603.09320) with inner product."""

import threading
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import Floats, Rows
from vllm_retrieval_attn.baselines.candidates import CALIBRATION_QUERIES, CandidateIndex, Cost, Effort

LINKS = 32
"""M: links a key keeps per upper level, twice that at the lowest. Faiss's own choice, and the degree of `roar`."""
EF_CONSTRUCTION = 80
"""Keys looked at to choose the links of a new one: more than the 2 M it may keep at level 0 (Faiss's 40 is fewer)."""

_faiss: Any = faiss  # its stubs leave HNSW out
_stats_in_use = threading.Lock()  # faiss.cvar.hnsw_stats is one for the process


class HnswIndex(CandidateIndex):
    """IndexHNSWFlat: attend over the efSearch best keys that the search finds.

    The budget becomes the efSearch that scores so many keys on average over prompt queries (keys, if there are none),
    measured when built and again when the rows have grown by a quarter. A search finds no more than efSearch keys.
    Searches of all indices in a process take turns, because Faiss counts distances in one place.
    """

    kind = "hnsw"

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> None:
        super().__init__(scale, dim, dtype)
        self._hnsw: Any = None
        self._effort: Effort | None = None
        self._calibrated = 0

    @property
    def index_bytes(self) -> int:
        """Faiss's link table with its offsets and levels.

        Its float32 copy of the keys is left out: it stands in for the rows.
        """
        if not self.built:
            return 0
        graph = self._hnsw.hnsw
        return 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()

    def _make(self) -> None:
        self._hnsw = faiss.IndexHNSWFlat(self.dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        self._hnsw.hnsw.efConstruction = EF_CONSTRUCTION
        self._hnsw.add(self._keys(0))
        self._calibrate()

    def _extend(self, first: int) -> None:
        self._hnsw.add(self._keys(first))
        if self.size > 1.25 * self._calibrated:
            self._calibrate()

    def _calibrate(self) -> None:
        guides = self._guides(CALIBRATION_QUERIES)
        self._effort = Effort.calibrate(lambda width: self._search(guides, width)[2].keys / len(guides), self.size)
        self._calibrated = self.size

    def _search(self, queries: Floats, width: int) -> tuple[Floats, Rows, Cost]:
        """(g, width) raw scores and rows. Edge bytes: the 2 * LINKS 4-byte links of level 0 for every key expanded."""
        params = _faiss.SearchParametersHNSW(efSearch=width)
        stats = _faiss.cvar.hnsw_stats
        with _stats_in_use:
            stats.reset()
            scores, rows = self._hnsw.search(queries, width, params=params)
            keys, hops = int(stats.ndis), int(stats.nhops)
        scores[rows < 0] = -np.inf
        return scores, rows, Cost(keys, hops * 2 * LINKS * 4)

    def _within(self, queries: Floats, budget: float) -> tuple[Floats, Rows, Cost]:
        assert self._effort is not None
        return self._search(queries, self._effort.width(budget * self.size))

    def _best(self, queries: Floats, k: int, budget: float) -> tuple[Floats, Rows, Cost]:
        scores, rows, cost = self._within(queries, budget)
        missing = ((0, 0), (0, max(0, k - rows.shape[1])))
        return (
            np.pad(scores[:, :k], missing, constant_values=-np.inf),
            np.pad(rows[:, :k], missing, constant_values=-1),
            cost,
        )

    def _candidates(self, queries: Floats, budget: float) -> tuple[list[Rows], Cost]:
        _, rows, cost = self._within(queries, budget)
        return [found[found >= 0] for found in rows], cost
