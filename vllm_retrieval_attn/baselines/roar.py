# SPDX-License-Identifier: Apache-2.0
"""`roar`: a RoarGraph (arXiv 2408.08933) over one KV head's keys, as RetrievalAttention (arXiv 2409.10516) searches."""

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import Floats, Rows
from vllm_retrieval_attn.baselines.candidates import (
    CALIBRATION_QUERIES,
    PROMPT_QUERIES,
    CandidateIndex,
    Cost,
    Effort,
    best_of,
)
from vllm_retrieval_attn.baselines.roar_graph import Graph, best_first, make_graph
from vllm_retrieval_attn.index.rows import FLOAT16, FLOAT32, memory_of

TAIL_SHARE = 0.25
TAIL_ROWS = 1024
"""The tail may have this share of the graph's rows and this many rows; beyond both, the graph is made anew."""


class RoarIndex(CandidateIndex):
    """A graph whose links come from prompt queries: attend over the pool of the search and over the tail.

    The budget becomes the pool width that scores so many keys on average over prompt queries (keys, if there are
    none), measured when built. ``search`` picks from all keys scored, not from the pool only.

    Appended rows make a tail that every search scores in full, at the budget's expense.
    """

    kind = "roar"

    def __init__(self, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> None:
        super().__init__(scale, dim, dtype)
        self._graph: Graph | None = None
        self._effort: Effort | None = None

    @property
    def index_bytes(self) -> int:
        """Links, and the prompt queries kept for making the graph anew."""
        return (self._graph.nbytes if self.built and self._graph else 0) + self.prompt.nbytes

    def _make(self) -> None:
        self._graph = make_graph(self._keys(0), self._guides(PROMPT_QUERIES))
        guides = self._guides(CALIBRATION_QUERIES)
        self._effort = Effort.calibrate(
            lambda width: sum(len(self._walk(query, width)[0]) for query in guides) / len(guides), self.size
        )

    def _extend(self, first: int) -> None:
        if self.size - self.built > max(TAIL_ROWS, TAIL_SHARE * self.built):
            self._remake()

    def _walk(self, query: Floats, width: int) -> tuple[Rows, Floats, int]:
        """Rows scored in the graph, their raw scores, and links read."""
        assert self._graph is not None
        graph = self._graph
        memory = memory_of(self.rows, FLOAT16 if self.rows.itemsize == 2 else FLOAT32)
        found: tuple[Rows, Floats, int] = best_first(memory, graph.starts, graph.links, graph.entries, query, width)
        return found

    def _scored(self, queries: Floats, budget: float) -> tuple[list[Rows], list[Floats], int, Cost]:
        """Rows scored and raw scores, one array a query, those of the tail last; and the pool's width."""
        assert self._effort is not None
        tail = np.arange(self.built, self.size)
        width = self._effort.width(budget * self.size - len(tail))
        tail_scores = queries @ self._keys(self.built).T
        rows: list[Rows] = []
        scores: list[Floats] = []
        links = 0
        for query, last in zip(queries, tail_scores, strict=True):
            row, score, read = self._walk(query, width)
            rows.append(np.concatenate((row, tail)))
            scores.append(np.concatenate((score, last)))
            links += read
        return rows, scores, width, Cost(sum(map(len, rows)), 4 * links)

    def _best(self, queries: Floats, k: int, budget: float) -> tuple[Floats, Rows, Cost]:
        rows, scores, _, cost = self._scored(queries, budget)
        return *best_of(scores, rows, k), cost

    def _candidates(self, queries: Floats, budget: float) -> tuple[list[Rows], Cost]:
        rows, scores, width, cost = self._scored(queries, budget)
        tail = self.size - self.built
        found = []
        for row, score in zip(rows, scores, strict=True):
            walked = len(row) - tail
            pool = np.argpartition(-score[:walked], width)[:width] if walked > width else np.arange(walked)
            found.append(np.concatenate((row[pool], row[walked:])))
        return found, cost
