"""The space that the model's keys are coded in: from an earlier start, or learned from the first long prompt."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.device.learning import SpaceLearner
from vllm_retrieval_attn.sketch.space import LEARNED, ROTATION, Space
from vllm_retrieval_attn.store.space_file import load_space, save_space

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.store.arena import Arena

LEARN_LEAST = 64
"""Fewer new tokens of a request are not worth taking into account for its space."""

logger = logging.getLogger("vllm.retrieval")


class ModelSpace:
    """Keeps the space where everybody finds it: the arena's views, the sketch, the cache folder.

    Args:
        path: where it is kept. arena: tells requests which space codes them. sketch: on the GPU, or None.
        sink_end: first token of a prompt that is learned from.
    """

    def __init__(self, path: Path, arena: "Arena", sketch: Any, sink_end: int) -> None:
        self.path, self._arena, self._sketch, self._sink_end = path, arena, sketch, sink_end
        self._learner: SpaceLearner | None = None
        self._learning: Future[Space] | None = None
        arena.before_open = self.settle
        lay = arena.layout
        space = load_space(path, lay.layers * lay.kv_heads, lay.dim)
        if space is None:
            self.forget()
            return
        self._keep(space)
        logger.info("retrieval: the model's space is taken from %s", path)

    def forget(self) -> None:
        """Learn the space anew, from the next prompt that is long enough."""
        self._arena.space = ROTATION
        self._learner = SpaceLearner(self._arena.layout.layers)

    def begin(self, metadata: "RetrievalMetadata", plan: "StepPlan") -> None:
        """A step begins: note which of its tokens are learned from, in ``plan.longest``."""
        if self._learner is None:
            return
        first, last = plan.longest
        row = int(np.searchsorted(metadata.query_start, first, side="right")) - 1 if last > first else 0
        first += max(0, self._sink_end - int(metadata.computed[row])) if last > first else 0
        plan.longest = (first, last) if last - first >= LEARN_LEAST else (0, 0)
        if plan.longest[1]:
            assert metadata.request_ids is not None
            self._learner.begin(metadata.request_ids[row], last - first)

    def add(self, layer: int, key: torch.Tensor, query: torch.Tensor, plan: "StepPlan") -> None:
        """Learn from the step's longest row, while the space is not known. Shapes as in device/cpu.py."""
        first, last = plan.longest
        if self._learner is not None and last > first:
            self._learner.add(layer, key[first:last], query[first:last])

    def end(self) -> None:
        """A step is over: begin to learn once there is enough. The prompt at hand does not wait for it."""
        if self._learner is None or not self._learner.complete:
            return
        learner, self._learner = self._learner, None
        learner.close()
        pool = ThreadPoolExecutor(1, thread_name_prefix="retrieval-space")
        self._learning = pool.submit(self._learn, learner)
        pool.shutdown(wait=False)

    def _learn(self, learner: SpaceLearner) -> Space:
        begin = time.monotonic()
        space = learner.space()
        kept = save_space(self.path, space)
        where = f", kept in {self.path}" if kept else ""
        logger.info("retrieval: learned the model's space in %.1f s%s", time.monotonic() - begin, where)
        return space

    def settle(self) -> None:
        """A request is about to be opened: if what was begun can concern it, wait for it. So which space codes a
        request depends on no clock."""
        if self._learning is None:
            return
        learning, self._learning = self._learning, None
        try:
            self._keep(learning.result())
        except ValueError as error:
            logger.warning("retrieval: no space is learned from this prompt: %s", error)
            self.forget()

    def _keep(self, space: Space) -> None:
        self._arena.views.keep_space(space)
        if self._sketch is not None:
            self._sketch.set_space(space)
        self._arena.space = LEARNED
