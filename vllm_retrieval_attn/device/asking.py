# SPDX-License-Identifier: Apache-2.0
"""Decode steps that replay one CUDA graph in which CPU workers answer (ask.cu): begun, and looked back at.

The message, its answers and what it tells lie in one place, so a step with rows is over before the next one begins.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.device.ask_kernels import (
    TOLD_FAILED,
    TOLD_LATE,
    TOLD_MISSED,
    TOLD_WAITED,
    Asked,
    AskKernels,
    describe,
)
from vllm_retrieval_attn.store.layout import ROW_TABLE, ROW_TOKENS, Layout

if TYPE_CHECKING:
    from vllm_retrieval_attn.device.plan import StepPlan
    from vllm_retrieval_attn.workers.client import RingClient

_SLOTS = 6
"""Descriptors that may be on their way: more than steps that vLLM keeps in flight."""


@dataclass
class Outcome:
    """How a step went.

    Attributes:
        plan: of the step. late: the workers were late or gone, and the GPU attended to host tokens itself, in
            ``missed`` layers. waited_s: for answers, over all layers. failed: requests whose search failed in some
            layer; the GPU attended to these itself there.
    """

    plan: "StepPlan"
    late: bool
    missed: int
    waited_s: float
    failed: list[str]


class Asking:
    """Of one rank; used by the vLLM worker's main thread.

    Args:
        layout: of the shared file of the rank. client: posts and closes. kernels: see AskKernels.
        limit_s: how long the GPU waits for an answer.
    """

    def __init__(self, layout: Layout, client: "RingClient", kernels: AskKernels, limit_s: float) -> None:
        self._layout, self._client, self.kernels = layout, client, kernels
        self._limit_ns = int(limit_s * 1e9)
        self._cuda = cuda = kernels.descriptor.is_cuda
        numbers = kernels.descriptor.numel()
        self._staged = [torch.zeros(numbers, dtype=torch.int64, pin_memory=cuda) for _ in range(_SLOTS)]
        self._free = [torch.cuda.Event() for _ in range(_SLOTS if cuda else 0)]
        self._slot = 0
        # Blocking: the CPUs are the workers' meanwhile.
        self._done: Any = torch.cuda.Event(blocking=True) if cuda else None
        self._plan: StepPlan | None = None

    @property
    def under_way(self) -> "StepPlan | None":
        """The step that :meth:`close` has not looked at yet."""
        return self._plan

    def open(self, plan: "StepPlan | None") -> None:
        """A graph is about to be replayed. No step may be under way.

        Args:
            plan: of its batch; None: nothing is asked or written. ``attends_here``: workers are not to be asked.
        """
        lay, step, late = self._layout, -1, False
        rows, writes = np.zeros((0, 3), np.int64), np.zeros((0, 2), np.int64)
        if plan is not None:
            places = plan.mirror_pages * lay.page_elements + plan.mirror_offsets * lay.row_elements
            writes = np.stack((plan.mirror_tokens, places), axis=1)
            message, late = plan.decode_rows, plan.attends_here
            rows = np.stack((plan.decode_tokens, message[:, ROW_TABLE], message[:, ROW_TOKENS]), axis=1)
            if len(rows):
                self._plan = plan
                self.kernels.told.zero_()
                if not late:
                    step = self._client.open_step(message)
        self._send(Asked(rows, writes, step, late, self._limit_ns))

    def _send(self, asked: Asked) -> None:
        slot = self._slot = (self._slot + 1) % _SLOTS
        if self._cuda:
            self._free[slot].synchronize()  # long ago, unless many steps are in flight
        describe(asked, self._layout, self._staged[slot].numpy())
        self.kernels.descriptor.copy_(self._staged[slot], non_blocking=True)
        if self._cuda:
            self._free[slot].record()

    def sent(self) -> None:
        """All kernels of the step are under way."""
        if self._plan is not None and self._done is not None:
            self._done.record()

    def close(self) -> Outcome | None:
        """Wait until the step is over; None if none is under way. It is over soon: its kernels wait within limits."""
        plan, self._plan = self._plan, None
        if plan is None:
            return None
        if self._done is not None:
            self._done.synchronize()
        told = self.kernels.told.numpy()
        asked = not plan.attends_here
        if asked:
            self._client.close_step()
        failed = [name for name, step in zip(plan.decode_ids, told[TOLD_FAILED:], strict=False) if step]
        late, missed = bool(told[TOLD_LATE]), int(told[TOLD_MISSED])
        return Outcome(plan, late, missed, int(told[TOLD_WAITED]) * 1e-9, failed)
