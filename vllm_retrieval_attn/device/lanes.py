# SPDX-License-Identifier: Apache-2.0
"""CPU lanes: threads of this process that attend to a share of the rows which a decode step reads, where they lie.

The GPU reads single rows over PCIe at some 45 GB/s, 14 cores read them from their memory at some 60; both together
are faster than either. What passes between them lies on the board (device/board.py, decode_lanes.cuh). The lanes are
threads of the serving process and no Ray actors, as no other process can map the arena that the GPU reads fast
(store/managed.py); they run compiled code without Python's lock (device/lane_loop.py).
"""

import contextlib
import logging
import os
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.core.limits import MOST_LANES
from vllm_retrieval_attn.device.board import DONE, LAYER, LINE, BoardLayout, board_of
from vllm_retrieval_attn.device.decode_step import Geometry, Handed
from vllm_retrieval_attn.device.lane_loop import SLEEPING, STOP, WORDS, lane_memory, serve, wake
from vllm_retrieval_attn.device.lane_share import LaneShare
from vllm_retrieval_attn.index.rows import DTYPE_CODES, memory_of

logger = logging.getLogger("vllm.retrieval.lanes")

_IDLE_NS = 3_000_000
"""How long a lane looks for the next layer before it sleeps: longer than what lies between two steps."""
_LIMIT_NS = 2_000_000
"""How long the GPU waits for a lane when its own runs are done."""
_PAUSES_S = (1.0, 60.0)
"""How long lanes are handed nothing after one was late: at first, and at most."""


class Lanes:
    """The lanes of one rank.

    Args:
        geometry: shapes. memory: the arena's bytes, uint8. cpus: a lane on each, MOST_LANES at most.

    Attributes:
        board: uint8 tensor, pinned where there is a GPU. count: how many lanes. late_steps: in how many steps one was
            late, ever.
    """

    def __init__(self, geometry: Geometry, memory: npt.NDArray[np.uint8], cpus: list[int]) -> None:
        layout = BoardLayout(geometry)
        self.board = torch.zeros(layout.bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._board, self._places = board_of(self.board.numpy()), layout.places
        self._words = np.zeros(WORDS, np.int32)
        self.count, self.late_steps = min(len(cpus), MOST_LANES), 0
        self._share = LaneShare()
        self._generation, self._pause_s, self._paused_until = 1, _PAUSES_S[0], 0.0
        rows = memory_of(memory, DTYPE_CODES[geometry.dtype])
        shared = self._board, self._places, rows
        self._threads = [
            threading.Thread(
                target=self._run, args=(cpu, lane, shared, geometry), name=f"retrieval-lane-{lane}", daemon=True
            )
            for lane, cpu in enumerate(cpus[: self.count])
        ]
        self._ready = threading.Barrier(self.count + 1)
        self.failed = False
        for thread in self._threads:
            thread.start()
        with contextlib.suppress(threading.BrokenBarrierError):
            self._ready.wait(300)

    def _run(self, cpu: int, lane: int, shared: Any, g: Geometry) -> None:
        try:
            os.sched_setaffinity(0, [cpu])  # of this thread alone
            arguments = (*shared, lane_memory(g.group, g.dim), lane, self.count, np.float32(g.scale), self._words)
            serve(*arguments, _IDLE_NS, 0)  # compiled, or loaded, before the first layer
            self._ready.wait(300)
            serve(*arguments, _IDLE_NS, 1)
        except threading.BrokenBarrierError:  # another one has said why
            self.failed = True
        except BaseException:
            self.failed = True
            logger.exception("retrieval: CPU lane %d ended; the GPU reads all rows itself from now on", lane)
            self._ready.abort()

    def open_step(self, rows: int) -> Handed | None:
        """What the next step, of ``rows`` rows with host tokens, hands to lanes, which are woken if it is something;
        None: they are left out for now."""
        if self.failed or not self._may_work():
            return None
        share = self._share.of(rows)
        if share:
            asleep = self._words[SLEEPING] != 0
            self.wake()
            if asleep:  # a layer would be over before all are awake
                return None
        return Handed(share, self._generation, _LIMIT_NS)

    def wake(self) -> None:
        """Let lanes that sleep look for layers."""
        wake(self._words)

    def _may_work(self) -> bool:
        if not self._paused_until:
            return True
        if time.monotonic() < self._paused_until or not self.idle():
            return False
        self._paused_until = 0.0
        self._generation += 1
        return True

    def idle(self) -> bool:
        """Whether all lanes have done what they were handed."""
        done = self._board.words[DONE // 8 : (DONE + self.count * LINE) // 8 : LINE // 8]
        return bool((done == self._board.words[LAYER]).all()) or not self._board.words[LAYER]

    def note(self, rows: int, handed: Handed, worked: bool, late: int, seconds: float) -> None:
        """What a step tells of lanes.

        Args:
            rows, handed: of open_step. worked: whether lanes were handed something in most layers: after a late one
            they are not. late: layers with a late lane. seconds: that reading a layer's rows took.
        """
        if late:
            self.late_steps += 1
            self._paused_until = time.monotonic() + self._pause_s
            logger.warning(
                "retrieval: a CPU lane did not answer within %.0f ms of the GPU's own part; the GPU reads all rows "
                "for %.0f s", _LIMIT_NS / 1e6, self._pause_s,
            )  # fmt: skip
            self._pause_s = min(2 * self._pause_s, _PAUSES_S[1])
        elif worked == (handed.share > 0):
            self._share.learn(rows, handed.share, seconds * 1e6)

    def shares(self) -> dict[str, float]:
        """The share of rows that lanes are handed, by the size of batches."""
        return self._share.all()

    def close(self) -> None:
        """End the threads. The GPU must be done with the board."""
        self._words[STOP] = 1
        self.wake()
        for thread in self._threads:
            thread.join(10)
