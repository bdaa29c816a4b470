# SPDX-License-Identifier: Apache-2.0
"""A background thread of an actor that compares sampled decode steps with exact attention (device/fidelity.py)."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.elsewhere import read_bytes
from vllm_retrieval_attn.index.rows import load, memory_of
from vllm_retrieval_attn.store.layout import (
    ACTOR_PROBES,
    FIDELITY_FIELDS,
    PROBE_ROW,
    PROBE_VALID,
    ROW_INDEXED,
    ROW_TABLE,
    ROW_TOKENS,
    WORD_PROBES,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.grower import be_nice
from vllm_retrieval_attn.workers.indexes import Indexes
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval.workers")

_POLL_S = 0.2
RECALL_AT = 100


class Prober(threading.Thread):
    """Serves the probes of one actor.

    Args:
        layout, views: the shared file of the rank. indexes: of the actor, to find its pages. actor: which share of the
            KV heads. scale: softmax scale.
    """

    def __init__(self, layout: Layout, views: Views, indexes: Indexes, actor: int, scale: float) -> None:
        super().__init__(name=f"retrieval-prober-{actor}", daemon=True)
        self._layout, self._views, self._actor, self._scale = layout, views, actor, scale
        self._indexes = indexes
        self._stopping = threading.Event()

    def run(self) -> None:
        be_nice()
        words = self._views.words
        done = self._views.actor_word(self._actor, ACTOR_PROBES)
        while not self._stopping.wait(_POLL_S):
            count = int(words[WORD_PROBES])
            if int(words[done]) == count:
                continue
            full_fence()
            try:
                self._serve()
            except Exception:  # a comparison that failed costs a sample, never the actor that serves
                self._views.fidelity[self._actor] = 0.0
                logger.exception("retrieval: comparing with exact attention failed")
            full_fence()
            words[done] = count

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)

    def _serve(self) -> None:
        """Write the sums of this probe; zeros if its request ended meanwhile, whose pages may be another's by then."""
        lay, numbers = self._layout, self._views.probe_numbers
        sums = np.zeros((lay.layers, FIDELITY_FIELDS))
        row = numbers[PROBE_ROW:].copy()
        for layer in range(lay.layers):
            for head in range(self._actor, lay.kv_heads, lay.actors):
                if self._stopping.is_set() or not numbers[PROBE_VALID]:
                    break
                sums[layer] += self._compare(layer, head, row)
        full_fence()
        self._views.fidelity[self._actor] = sums if numbers[PROBE_VALID] else 0.0

    def _compare(self, layer: int, head: int, row: npt.NDArray[np.int64]) -> tuple[float, ...]:
        """Sums over the query heads of a KV head, in the order of FIDELITY_FIELDS: their number, recall@100 and mass of
        the rows read, error of the layer's output (paged and host part merged) relative to that with exact attention,
        and signed error of the log-sum-exp."""
        lay = self._layout
        tokens = int(row[ROW_TOKENS])
        table = self._views.tables[int(row[ROW_TABLE]), : lay.page_tokens_owned(tokens)].copy()
        if len(table) == 0 or table.min() < 0 or table.max() >= lay.pages:
            return (0.0,) * FIDELITY_FIELDS  # the request ended
        probe = self._views.probe[layer, head * lay.group : (head + 1) * lay.group]
        queries, found, paged = np.moveaxis(probe[:, : 3 * lay.dim].reshape(lay.group, 3, lay.dim), 1, 0)
        found_lse, paged_lse = probe[:, 3 * lay.dim :].T
        scores = np.empty((lay.group, tokens), np.float32)
        for first, rows in self._rows(layer, head, table, tokens):
            scores[:, first : first + len(rows)] = queries @ rows[:, 0].T * np.float32(self._scale)
        lse = np.logaddexp.reduce(scores, axis=1, dtype=np.float64)
        weights = np.exp(scores - lse[:, None]).astype(np.float32)
        out = np.zeros((lay.group, lay.dim), np.float32)
        for first, rows in self._rows(layer, head, table, tokens):
            out += weights[:, first : first + len(rows)] @ rows[:, 1]
        exact = _merged(out, lse, paged, paged_lse)
        difference = _merged(found, found_lse, paged, paged_lse) - exact
        error = np.linalg.norm(difference, axis=1) / np.maximum(np.linalg.norm(exact, axis=1), 1e-20)
        bias = np.logaddexp(found_lse, paged_lse) - np.logaddexp(lse, paged_lse)
        read = self._read(layer, head, row)
        few = min(RECALL_AT, tokens)
        best = np.argpartition(scores, tokens - few, axis=1)[:, tokens - few :]
        recall = read[best].mean(1)
        mass = (weights * read).sum(1)
        return float(lay.group), *(float(part.sum()) for part in (recall, mass, error, bias))

    def _rows(
        self, layer: int, head: int, table: npt.NDArray[np.int64], tokens: int
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """First token and rows (n, 2, d) of each page of a KV head."""
        lay = self._layout
        raw = np.empty(lay.head_elements * lay.itemsize, np.uint8)
        rows = np.empty(lay.head_elements, np.float32)
        memory = memory_of(raw, lay.dtype_code)
        for number, page in enumerate(table.tolist()):
            read_bytes(self._indexes.source, page * lay.page_elements + self._indexes.row_base(layer, head), raw)
            load(memory, 0, len(rows), rows)
            first = number * lay.page_tokens
            yield first, rows.reshape(-1, 2, lay.dim)[: tokens - first]

    def _read(self, layer: int, head: int, row: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """(tokens,) which host tokens the step read: those chosen, and all beyond the index."""
        read = np.ones(int(row[ROW_TOKENS]), np.bool_)
        indexed = int(row[ROW_INDEXED])
        if indexed:
            chosen = self._views.chosen[layer, head]
            read[:indexed] = False
            read[chosen[1 : 1 + int(chosen[0])]] = True
        return read


def _merged(one: Any, one_lse: Any, other: Any, other_lse: Any) -> Any:
    """Two partial results, (n, d) and (n,), merged by log-sum-exp."""
    both = np.logaddexp(one_lse, other_lse)
    return one * np.exp(one_lse - both)[:, None] + other * np.exp(other_lse - both)[:, None]
