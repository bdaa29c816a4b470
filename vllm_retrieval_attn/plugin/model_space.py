# SPDX-License-Identifier: Apache-2.0
"""The space that the model's keys are coded in: from an earlier start, or learned from the first long prompt."""

import logging
import time
from collections.abc import Collection
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

logger = logging.getLogger("vllm.retrieval.fidelity")


class ModelSpace:
    """Keeps the space where everybody finds it: the arena's views, the sketch, the cache folder.

    Args:
        path: where it is kept. arena: tells requests which space codes them. sketch: on the GPU, or None.
        sink_end: first token of a prompt that is learned from.
    """

    def __init__(self, path: Path, arena: "Arena", sketch: Any, sink_end: int) -> None:
        self.path, self._arena, self._sketch, self._sink_end = path, arena, sketch, sink_end
        self._learner: SpaceLearner | None = None
        self._learning: Future[tuple[Space, int]] | None = None
        arena.before_open = self.settle
        lay = arena.layout
        known = load_space(path, lay.layers * lay.kv_heads, lay.dim)
        if known is None:
            self.forget()
            return
        self._keep(*known)
        logger.info("retrieval: the model's space is taken from %s", path)

    def forget(self) -> None:
        """Learn the space anew, from the next prompt that is long enough."""
        self._arena.space, self._arena.space_tokens = ROTATION, 0
        self._learner = SpaceLearner(self._arena.layout.layers)

    def look(self, scheduled: Collection[str]) -> None:
        """A step is to come, with these requests: one that has no part in it brings no more to learn from."""
        if self._learner is not None and self._learner.request not in scheduled:
            self._conclude()

    def begin(self, metadata: "RetrievalMetadata", plan: "StepPlan") -> None:
        """A step begins: note which of its tokens are learned from, in ``plan.learned``. A prompt is learned from to
        its end; if it was long enough, the space is computed then, and if not, another one is tried."""
        if self._learner is None:
            return
        assert metadata.request_ids is not None
        lens = np.asarray(metadata.query_lens)
        row = metadata.request_ids.index(self._learner.request) if self._learner.request in metadata.request_ids else -1
        if row < 0 or lens[row] < LEARN_LEAST:
            if self._conclude():
                return
            row = int(lens.argmax())
        first = int(metadata.query_start[row]) + max(0, self._sink_end - int(metadata.computed[row]))
        last = int(metadata.query_start[row]) + int(lens[row])
        if last - first >= LEARN_LEAST:
            plan.learned = first, last
            self._learner.begin(metadata.request_ids[row], last - first)

    def add(self, layer: int, key: torch.Tensor, query: torch.Tensor, plan: "StepPlan") -> None:
        """Learn from the step's tokens, while the space is not known. Shapes as in device/cpu.py."""
        first, last = plan.learned
        if self._learner is not None and last > first:
            self._learner.add(layer, key[first:last], query[first:last])

    def _conclude(self) -> bool:
        """Begin to compute the space if the prompt at hand brought enough. Nothing waits for it yet."""
        if self._learner is None or not self._learner.enough:
            return False
        learner, self._learner = self._learner, None
        learner.close()
        pool = ThreadPoolExecutor(1, thread_name_prefix="retrieval-space")
        self._learning = pool.submit(self._learn, learner)
        pool.shutdown(wait=False)
        return True

    def _learn(self, learner: SpaceLearner) -> tuple[Space, int]:
        begin = time.monotonic()
        space = learner.space()
        kept = save_space(self.path, space, learner.tokens)
        where = f", kept in {self.path}" if kept else ""
        logger.info(
            "retrieval: learned the model's space from %d tokens in %.1f s%s",
            learner.tokens, time.monotonic() - begin, where,
        )  # fmt: skip
        return space, learner.tokens

    def finish(self) -> None:
        """No prompt is under way: take what the last one brought, and wait for it."""
        self._conclude()
        self.settle()

    def settle(self) -> None:
        """A request is about to be opened: if what was begun can concern it, wait for it. So which space codes a
        request depends on no clock."""
        if self._learning is None:
            return
        learning, self._learning = self._learning, None
        try:
            self._keep(*learning.result())
        except ValueError as error:
            logger.warning("retrieval: no space is learned from this prompt: %s", error)
            self.forget()

    def _keep(self, space: Space, tokens: int) -> None:
        self._arena.views.keep_space(space)
        if self._sketch is not None:
            self._sketch.set_space(space)
        self._arena.space, self._arena.space_tokens = LEARNED, tokens
