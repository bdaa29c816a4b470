"""A background thread of an actor that compares sampled decode steps with exact search (attention/fidelity.py)."""

import logging
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.store.layout import (
    ACTOR_PROBES,
    PROBE_ROW,
    PROBE_VALID,
    ROW_TABLE,
    ROW_TOKENS,
    WORD_PROBES,
    Layout,
)
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.builder import be_nice
from vllm_retrieval_attn.workers.slab_work import torch_pages
from vllm_retrieval_attn.workers.sync import full_fence

logger = logging.getLogger("vllm.retrieval")

_POLL_S = 0.05
RECALL_AT = 100

Attended = Callable[[int, int, npt.NDArray[np.int64], npt.NDArray[np.float32]], npt.NDArray[np.bool_]]
"""(layer, KV head, row of the message, (group, d) float32 queries) -> (group, tokens) keys attended to exactly."""


class Prober(threading.Thread):
    """Serves the probes of one actor.

    Args:
        layout, views: the shared file of the rank. actor: which share of the KV heads. scale: softmax scale.
        attended: what the index attends to exactly. The search is done again for it, in one piece where lanes cut
            it, so that recall and mass may differ a little from those of the step; the error is that of the step.
    """

    def __init__(self, layout: Layout, views: Views, actor: int, scale: float, attended: Attended) -> None:
        super().__init__(name=f"retrieval-prober-{actor}", daemon=True)
        self._layout, self._views, self._actor = layout, views, actor
        self._scale, self._attended = scale, attended
        self._pages = torch_pages(layout, views)
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
                logger.exception("retrieval: comparing with exact search failed")
            full_fence()
            words[done] = count

    def stop(self) -> None:
        self._stopping.set()
        self.join(timeout=5)

    def _serve(self) -> None:
        """Write the sums of this probe; zeros if its request ended meanwhile, whose pages may be another's by then."""
        lay, numbers = self._layout, self._views.probe_numbers
        sums = np.zeros((lay.layers, 4))
        row = numbers[PROBE_ROW:].copy()
        for layer in range(lay.layers):
            for head in range(self._actor, lay.kv_heads, lay.actors):
                if self._stopping.is_set() or not numbers[PROBE_VALID]:
                    break
                sums[layer] += self._compare(layer, head, row)
        full_fence()
        self._views.fidelity[self._actor] = sums if numbers[PROBE_VALID] else 0.0

    def _compare(self, layer: int, head: int, row: npt.NDArray[np.int64]) -> tuple[float, float, float, float]:
        """Sums over the query heads of a KV head: their number, recall@100, mass attended to exactly, and the error
        of the layer's output (paged and host part merged) relative to that with exact search."""
        lay = self._layout
        tokens = int(row[ROW_TOKENS])
        table = self._views.tables[int(row[ROW_TABLE]), : lay.page_tokens_owned(tokens)].copy()
        if len(table) == 0 or table.min() < 0 or table.max() >= lay.pages:
            return 0.0, 0.0, 0.0, 0.0  # the request ended
        rows = self._pages[torch.from_numpy(table), layer, head]  # (pages, 2, page_tokens, d)
        keys, values = rows.transpose(0, 1).reshape(2, -1, lay.dim)[:, :tokens].float()
        mine = self._views.probe[layer, head * lay.group : (head + 1) * lay.group].copy()
        probe = torch.from_numpy(mine)
        queries, found, paged = probe[:, : 3 * lay.dim].view(lay.group, 3, lay.dim).unbind(1)
        found_lse, paged_lse = probe[:, 3 * lay.dim :].unbind(1)
        scores = queries @ keys.T * self._scale
        lse = scores.logsumexp(1)
        weights = (scores - lse[:, None]).exp()
        exact = _merged(weights @ values, lse, paged, paged_lse)
        error = (_merged(found, found_lse, paged, paged_lse) - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-20)
        kept = torch.from_numpy(self._attended(layer, head, row, mine[:, : lay.dim]))
        best = scores.topk(min(RECALL_AT, tokens), dim=1).indices
        recall = kept.gather(1, best).float().mean(1)
        mass = (weights * kept).sum(1)
        return float(lay.group), float(recall.sum()), float(mass.sum()), float(error.sum())


def _merged(one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Two partial results, (n, d) and (n,), merged by log-sum-exp."""
    both = torch.logaddexp(one_lse, other_lse)
    return one * (one_lse - both).exp()[:, None] + other * (other_lse - both).exp()[:, None]
