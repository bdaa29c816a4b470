# SPDX-License-Identifier: Apache-2.0
"""Decode steps that are compared with exact attention: 1 in 500 by default.

Such a step hands a row's queries and results in all layers, and the rows that it read, to the CPU workers. They compare
them with exact attention off the serving path (workers/prober.py); what they find is kept as running figures.
"""

import logging
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    FIDELITY_BIAS,
    FIDELITY_ERROR,
    FIDELITY_HEADS,
    FIDELITY_MASS,
    FIDELITY_RECALL,
    PROBE_ROW,
    PROBE_VALID,
    ROW_INDEXED,
    ROW_TABLE,
    TAU_UNIT,
    WORD_PROBES,
    Layout,
)
from vllm_retrieval_attn.workers.sync import full_fence

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.device.sketch_probe import HostPart
    from vllm_retrieval_attn.store.views import Views

RUNNING = 50
"""The running figures are means of about so many probes."""
TELL_EVERY = 20
"""Probes from one log line to the next."""
LAYER_GROUPS = 4
"""Figures are told for so many groups of neighbouring layers."""
FIGURES = {
    "recall": FIDELITY_RECALL,
    "mass": FIDELITY_MASS,
    "output_error": FIDELITY_ERROR,
    "lse_bias": FIDELITY_BIAS,
}

logger = logging.getLogger("vllm.retrieval.fidelity")

Floats = npt.NDArray[np.float32]


class DecodeSampler:
    """Used by the vLLM worker's main thread.

    Args:
        layout, views: the shared file of the rank. share: of decode steps to compare with exact attention.

    Attributes:
        share: may be changed. probes: steps compared so far.
    """

    def __init__(self, layout: Layout, views: "Views", share: float) -> None:
        self._layout, self._views, self.share = layout, views, share
        self._random, self._rows = random.Random(0), random.Random(0)
        self._probed: int | None = None
        self._drawn: bool | None = None
        self._by_workers = True
        self._waiting = False
        self._layers_seen = 0
        self._figures = np.zeros((layout.layers, len(FIGURES)))
        self.probes = 0
        views.probe_numbers[:] = 0

    @property
    def active(self) -> bool:
        """Whether the layers of this step are to be given to :meth:`record`."""
        return self._probed is not None and self._by_workers

    def draw(self) -> bool:
        """Whether the step about to run is to be looked at; it may then not be one graph."""
        self._poll()
        # Alike in all tensor-parallel ranks, which must not take a step as a graph here and in pieces there.
        self._drawn = self._random.random() < self.share
        return self._drawn

    def begin(self, plan: "StepPlan") -> None:
        """Choose what to look at in a step; sets ``plan.probe``, or that of its sketch."""
        drawn = self.draw() if self._drawn is None else self._drawn
        self._probed, self._layers_seen, self._drawn = None, 0, None
        if not drawn or self._waiting:
            return
        searched = [row for row, message in enumerate(plan.decode_rows) if message[ROW_INDEXED] > 0]
        sketched = [row for row, of in enumerate(plan.sketch.rows) if of.tokens > 0] if plan.sketch is not None else []
        if not searched and not sketched:
            return
        number = self._rows.randrange(len(searched) + len(sketched))
        numbers = self._views.probe_numbers
        self._by_workers = number < len(searched)
        if self._by_workers:
            self._probed = plan.probe = searched[number]
            numbers[PROBE_ROW:] = plan.decode_rows[self._probed]
        else:
            assert plan.sketch is not None
            self._probed = plan.sketch.probe = sketched[number - len(searched)]
            row = plan.sketch.rows[self._probed]
            # All host tokens are searched by their codes.
            of = (row.tokens, row.tokens, row.position, row.limit, round(row.tau / TAU_UNIT), row.seed)
            numbers[PROBE_ROW:] = (*plan.sketch.tables[self._probed], *of)
        numbers[PROBE_VALID] = 1

    def record(
        self, layer: int, queries: Any, found: Floats, found_lse: Floats, paged: Floats, paged_lse: Floats
    ) -> None:
        """Keep what the chosen row has to say in one layer.

        Args:
            queries: (rows, heads, d) tensor in host memory, unscaled. found, found_lse: (rows, heads, d) and
                (rows, heads), the host's answer. paged, paged_lse: likewise, over sinks and window.
        """
        row = self._probed
        assert row is not None
        self._keep(layer, queries[row].float().numpy(), (found[row], found_lse[row]), (paged[row], paged_lse[row]))

    def record_sketched(self, layer: int, query: Floats, found: "HostPart", paged: Floats, paged_lse: Floats) -> None:
        """The same of a row that the sketch has answered: (heads, d), (heads,)."""
        for head, ids in enumerate(found.chosen):
            kept = self._views.chosen[layer, head]
            kept[0], kept[1 : 1 + len(ids)] = len(ids), ids
        self._keep(layer, query, (found.out, found.lse), (paged, paged_lse))

    def _keep(self, layer: int, query: Floats, found: tuple[Floats, Floats], paged: tuple[Floats, Floats]) -> None:
        dim = self._layout.dim
        target = self._views.probe[layer]
        target[:, :dim] = query
        target[:, dim : 2 * dim], target[:, 3 * dim] = found
        target[:, 2 * dim : 3 * dim], target[:, 3 * dim + 1] = paged
        self._layers_seen += 1

    def end(self) -> None:
        """The step is over: hand over what is complete."""
        if self._probed is not None and self._layers_seen == self._layout.layers:
            full_fence()
            self._views.words[WORD_PROBES] += 1
            self._waiting = True
        self._probed = None

    def cancel(self) -> None:
        """The step at hand is not what it should be; look at another one."""
        self._probed = None

    def forget(self, slot: int) -> None:
        """A page table changes hands; what a probe reads through it no longer counts."""
        if int(self._views.probe_numbers[PROBE_ROW + ROW_TABLE]) == slot:
            self._views.probe_numbers[PROBE_VALID] = 0
            full_fence()  # before pages are written anew: see workers/prober.py

    def _poll(self) -> None:
        """Take in a finished probe."""
        if not self._waiting:
            return
        views = self._views
        if views.probing():
            return
        self._waiting = False
        sums = views.fidelity.sum(axis=0)
        if not views.fidelity[:, :, FIDELITY_HEADS].any(axis=1).all():
            return  # its request ended meanwhile
        means = sums[:, list(FIGURES.values())] / sums[:, [FIDELITY_HEADS]]
        self.probes += 1
        self._figures += (means - self._figures) / min(self.probes, RUNNING)
        if self.probes % TELL_EVERY == 1:
            told = "; ".join(
                f"{layers} recall@100 {of['recall']:.3f} mass {of['mass']:.3f} error {of['output_error']:.4f} "
                f"LSE {of['lse_bias']:+.4f}"
                for layers, of in self.figures().items()
            )
            logger.info("retrieval: against exact attention, mean of the last %d: %s", min(self.probes, RUNNING), told)

    def figures(self) -> dict[str, dict[str, float]]:
        """Running means by group of layers, named as in FIGURES; empty before the first probe."""
        self._poll()
        if not self.probes:
            return {}
        told = {}
        for layers in np.array_split(np.arange(self._layout.layers), min(LAYER_GROUPS, self._layout.layers)):
            means = self._figures[layers].mean(axis=0)
            told[f"layers {layers[0]}-{layers[-1]}"] = {
                name: round(float(mean), 4) for name, mean in zip(FIGURES, means, strict=True)
            }
        return told
