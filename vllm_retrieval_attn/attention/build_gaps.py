"""Gaps between two layers of a prefill, in which the GPU runs a build's kernels and nothing else.

A build is some 200 short kernels. Left to run beside a prefill each waits until a kernel of milliseconds has ended, and
the next of these, which is launched to hold all multiprocessors at once, then waits in turn for those it does not get:
both take several times as long as one after the other (docs/benchmarks.md). So a build asks for a gap, the forward
pass leaves one before its next layer, and all kernels of the build run in it, one right after the other.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LARGE = 1024
"""Tokens of a batch from which on its kernels fill the GPU. Beside smaller ones a build runs as it comes."""
_PATIENCE_S = 0.25
"""A layer of a prefill takes a tenth of this: no prefill is running if no gap comes."""
_LAUNCH_S = 1.0
"""The forward pass waits no longer for a build's kernels to be launched, which takes milliseconds."""


class _Gap:
    def __init__(self, begin: Any) -> None:
        self.begin, self.end = begin, None


class BuildGaps:
    """What the thread of the forward pass and the one that builds agree on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._wanted = self._large = False
        self._offered: _Gap | None = None

    @contextmanager
    def gap(self) -> Iterator[None]:
        """The building thread launches kernels in it, on its current stream, and waits for none of them."""
        with self._condition:
            self._wanted = True
            self._condition.wait_for(lambda: self._offered is not None or not self._large, _PATIENCE_S)
            self._wanted = False
            gap, self._offered = self._offered, None
        if gap is None:
            yield
            return
        self._follow(gap.begin)
        try:
            yield
        finally:
            with self._condition:
                gap.end = self._mark()
                self._condition.notify_all()

    def before_layer(self, tokens: int) -> None:
        """Leave a gap here if one is asked for. For the thread of the forward pass.

        Args:
            tokens: of the batch.
        """
        large = tokens >= LARGE
        if large == self._large and not (large and self._wanted):
            return
        with self._condition:
            self._large = large
            if not large or not self._wanted:
                self._condition.notify_all()
                return
            self._wanted = False
            gap = self._offered = _Gap(self._mark())
            self._condition.notify_all()
            self._condition.wait_for(lambda: gap.end is not None, _LAUNCH_S)
            if self._offered is gap:
                self._offered = None
        if gap.end is not None:
            self._follow(gap.end)

    def _mark(self) -> Any:
        event = torch.cuda.Event()
        event.record()
        return event

    def _follow(self, event: Any) -> None:
        torch.cuda.current_stream().wait_event(event)
