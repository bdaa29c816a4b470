"""Decode steps that are looked at more closely: a few are compared with exact search, of more the queries are kept.

*Probes* (1 in 500 decode steps by default) hand a row's queries and results to the CPU workers, which compare them
with exact search off the serving path (workers/prober.py); what they find is kept as running figures.

*Notes* (1 in NOTE_EVERY tokens of a request) replace the sampled queries that a request's index is calibrated with,
oldest first, by those of what is being generated. After a full round the builders look whether the calibration still
fits (workers/builder.py).
"""

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    FIDELITY_ERROR,
    FIDELITY_HEADS,
    FIDELITY_MASS,
    FIDELITY_RECALL,
    PROBE_ROW,
    PROBE_VALID,
    ROW_INDEXED,
    ROW_TABLE,
    WORD_PROBES,
    Layout,
)
from vllm_retrieval_attn.workers.sync import full_fence

if TYPE_CHECKING:
    from vllm_retrieval_attn.attention.plan import StepPlan
    from vllm_retrieval_attn.store.views import Views

NOTE_EVERY = 32
RUNNING = 50
"""The running figures are means of about so many probes."""
TELL_EVERY = 20
"""Probes from one log line to the next."""
LAYER_GROUPS = 4
"""Figures are told for so many groups of neighbouring layers."""

logger = logging.getLogger("vllm.retrieval")

Floats = npt.NDArray[np.float32]


class DecodeSampler:
    """Used by the vLLM worker's main thread.

    Args:
        layout, views: the shared file of the rank. share: of decode steps to compare with exact search.
        refresh: called with the page table of a request whose sampled queries have all been replaced.
    """

    def __init__(self, layout: Layout, views: "Views", share: float, refresh: Callable[[int], None]) -> None:
        self._layout, self._views, self._share, self._refresh = layout, views, share, refresh
        self._random = random.Random(0)
        self._decoded: dict[int, int] = {}
        self._notes: list[tuple[int, int]] = []  # (row of the message, page table)
        self._probed: int | None = None
        self._waiting = False
        self._layers_seen = 0
        self._figures = np.zeros((layout.layers, 3))
        self.probes = 0
        views.probe_numbers[:] = 0

    @property
    def active(self) -> bool:
        """Whether the layers of this step are to be given to :meth:`record`."""
        return self._probed is not None or bool(self._notes)

    def begin(self, plan: "StepPlan") -> None:
        """Choose what to look at in a step."""
        self._poll()
        self._notes, self._probed, self._layers_seen = [], None, 0
        indexed = []
        for row, message in enumerate(plan.decode_rows):
            slot = int(message[ROW_TABLE])
            count = self._decoded[slot] = self._decoded.get(slot, 0) + 1
            if count % NOTE_EVERY == 0:
                self._notes.append((row, slot))
            if message[ROW_INDEXED] > 0:
                indexed.append(row)
        if indexed and not self._waiting and self._random.random() < self._share:
            self._probed = self._random.choice(indexed)
            numbers = self._views.probe_numbers
            numbers[PROBE_ROW:] = plan.decode_rows[self._probed]
            numbers[PROBE_VALID] = 1

    def record(
        self, layer: int, queries: Any, found: Floats, found_lse: Floats, paged: Floats, paged_lse: Floats
    ) -> None:
        """Keep what the chosen rows have to say in one layer.

        Args:
            queries: (rows, heads, d) tensor in host memory, unscaled. found, found_lse: (rows, heads, d) and
                (rows, heads), the host's answer. paged, paged_lse: likewise, over sink and window.
        """
        lay, dim = self._layout, self._layout.dim
        if self._probed is not None:
            row = self._probed
            target = self._views.probe[layer]
            target[:, :dim] = queries[row].float().numpy()
            target[:, dim : 2 * dim], target[:, 3 * dim] = found[row], found_lse[row]
            target[:, 2 * dim : 3 * dim], target[:, 3 * dim + 1] = paged[row], paged_lse[row]
            self._layers_seen += 1
        for row, slot in self._notes:
            place = (self._decoded[slot] // NOTE_EVERY - 1) % lay.samples
            heads = (lay.kv_heads, lay.group)
            self._views.samples[slot, layer, :, :, place] = queries[row].float().numpy().reshape(*heads, dim)
            lse = np.logaddexp(found_lse[row], paged_lse[row])
            self._views.sample_lse[slot, layer, :, :, place] = lse.reshape(heads)

    def end(self) -> None:
        """The step is over: hand over what is complete."""
        if self._probed is not None and self._layers_seen == self._layout.layers:
            full_fence()
            self._views.words[WORD_PROBES] += 1
            self._waiting = True
        for _, slot in self._notes:
            if self._decoded[slot] % (NOTE_EVERY * self._layout.samples) == 0:
                self._refresh(slot)
        self._notes, self._probed = [], None

    def forget(self, slot: int) -> None:
        """A page table changes hands; what a probe reads through it no longer counts."""
        self._decoded.pop(slot, None)
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
        if not views.fidelity[:, :, FIDELITY_HEADS].all():
            return  # its request ended meanwhile
        means = sums[:, [FIDELITY_RECALL, FIDELITY_MASS, FIDELITY_ERROR]] / sums[:, [FIDELITY_HEADS]]
        self.probes += 1
        self._figures += (means - self._figures) / min(self.probes, RUNNING)
        if self.probes % TELL_EVERY == 1:
            told = "; ".join(
                f"{layers} recall@100 {of['recall']:.3f} mass {of['mass']:.3f} error {of['output_error']:.4f}"
                for layers, of in self.figures().items()
            )
            logger.info("retrieval: against exact search, mean of the last %d: %s", min(self.probes, RUNNING), told)

    def figures(self) -> dict[str, dict[str, float]]:
        """Running means by group of layers: recall@100, mass attended to exactly, output_error; empty before the
        first probe."""
        self._poll()
        if not self.probes:
            return {}
        told = {}
        for layers in np.array_split(np.arange(self._layout.layers), min(LAYER_GROUPS, self._layout.layers)):
            recall, mass, error = self._figures[layers].mean(axis=0)
            told[f"layers {layers[0]}-{layers[-1]}"] = {
                "recall": round(float(recall), 4),
                "mass": round(float(mass), 4),
                "output_error": round(float(error), 4),
            }
        return told
