# SPDX-License-Identifier: Apache-2.0
"""A line in the log for a decode step whose layers took much longer than usual, with their parts."""

import logging
import time

TIMES, AT_LEAST_S = 5.0, 0.002
"""A step is slow if its layers took so many times the usual time, and so much more a layer."""
_RUNNING, _FIRST = 100, 20
_EVERY_S = 10.0

logger = logging.getLogger("vllm.retrieval.steps")


class SlowSteps:
    """Knows what is usual: a running mean, in which a slow step counts as twice the usual at most."""

    def __init__(self) -> None:
        self._usual, self._steps = 0.0, 0
        self._told, self._untold = -_EVERY_S, 0

    def look(self, parts: dict[str, float]) -> bool:
        """``parts``: seconds of each part of a layer. Whether the step was slow."""
        took = sum(parts.values())
        slow = self._steps >= _FIRST and took > TIMES * self._usual and took - self._usual > AT_LEAST_S
        if slow:
            self._tell(took, parts)
        self._steps += 1
        share = 1 / min(self._steps, _RUNNING)
        self._usual += ((min(took, 2 * self._usual) if slow else took) - self._usual) * share
        return slow

    def _tell(self, took: float, parts: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self._told < _EVERY_S:
            self._untold += 1
            return
        more = f"; {self._untold} more since the last such line" if self._untold else ""
        self._told, self._untold = now, 0
        logger.warning(
            "retrieval: slow step: a layer took %.2f ms, usual are %.2f (%s)%s", took * 1e3, self._usual * 1e3,
            ", ".join(f"{part} {seconds * 1e3:.2f}" for part, seconds in parts.items()), more,
        )  # fmt: skip
