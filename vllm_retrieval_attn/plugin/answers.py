# SPDX-License-Identifier: Apache-2.0
"""What the CPU workers answer in a step, and what it means where they do not: the engine does their part, exactly."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.store.layout import ROW_TOKENS
from vllm_retrieval_attn.workers.client import RingClient, WorkersLate

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.asking import Asking
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.store.arena import Arena

logger = logging.getLogger("vllm.retrieval")

_TELL_EVERY_S = 10.0


class Answers:
    """Of one rank; used by the vLLM worker's main thread.

    Args:
        arena, client: of the rank. asking: steps in which a graph asks; None on CPU, and where the GPU has codes.
        on_late: called when the engine begins to do the workers' part in a step.

    Attributes:
        degraded_steps: steps in which it did, ever. degraded, failed: requests of such steps, and those whose search
            failed, until somebody takes them. waited_s: for answers, in the step under way.
    """

    def __init__(
        self, arena: "Arena", client: RingClient, asking: "Asking | None", on_late: Callable[[], None]
    ) -> None:
        self._arena, self._client, self._asking, self._on_late = arena, client, asking, on_late
        self.degraded_steps = 0
        self.degraded: set[str] = set()
        self.failed: set[str] = set()
        self.waited_s = self._posted = 0.0
        self._told_degraded = -_TELL_EVERY_S

    def post(self, layer: int, plan: "StepPlan") -> None:
        """Send a layer's message, unless the engine does the workers' part in this step."""
        if not plan.attends_here:
            self._posted = time.perf_counter()
            self._client.post(layer, plan.decode_rows, plan.probe)

    def collect(self, plan: "StepPlan", found: Any, found_lse: Any) -> bool:
        """Wait for the answer to a layer's message; arguments as RingClient.collect's. False: there is none, in this
        layer and all that follow in this step."""
        if not plan.attends_here:
            try:
                failed = self._client.collect(found, found_lse)
            except WorkersLate as error:
                self.attend_here(plan, str(error))
            self.waited_s += time.perf_counter() - self._posted
        if plan.attends_here:
            self._count(plan, 0, 1)
            return False
        self._count(plan, 1, 0)
        if len(failed):
            self._fail(plan, [plan.decode_ids[row] for row in failed])
        return True

    def close_graph(self) -> "StepPlan | None":
        """Look back at the step whose graph asked, once it is over; None if there is none."""
        outcome = self._asking.close() if self._asking is not None else None
        if outcome is None:
            return None
        plan, layers = outcome.plan, self._arena.layout.layers
        missed = layers if plan.attends_here else outcome.missed
        if outcome.late and not plan.attends_here:
            self.attend_here(plan, f"CPU workers did not answer in {missed} of {layers} layers")
        self.waited_s = outcome.waited_s
        self._count(plan, layers - missed, missed)
        self.degraded.update(outcome.failed)
        return plan

    def _count(self, plan: "StepPlan", answered: int, missed: int) -> None:
        """Count what was read in some layers that the workers answered, and in some that the engine did itself. What
        late workers still read of those is counted as well."""
        heads = self._arena.layout.kv_heads
        if answered:
            plan.rows_read += self._arena.views.read[: len(plan.decode_ids)].sum(1)
        plan.rows_read += missed * heads * plan.decode_rows[:, ROW_TOKENS]
        plan.searches += (answered + missed) * heads

    def attend_here(self, plan: "StepPlan", why: str) -> None:
        """The engine attends to the host in this step, exactly, from the layer at hand on."""
        plan.attends_here = True
        self.degraded_steps += 1
        self.degraded.update(plan.decode_ids)
        self._on_late()
        now = time.monotonic()
        if now - self._told_degraded > _TELL_EVERY_S:
            self._told_degraded = now
            logger.warning(
                "retrieval: %s: the engine attends to host memory itself, exactly (step %d of this kind)",
                why, self.degraded_steps,
            )  # fmt: skip

    def _fail(self, plan: "StepPlan", request_ids: list[str]) -> None:
        """The search of these requests can not be done: they end with an error, others go on."""
        if new := set(request_ids) - plan.failed:
            logger.error("retrieval: %d request(s) fail: see the CPU workers' log", len(new))
        plan.failed.update(request_ids)
        self.failed.update(request_ids)
