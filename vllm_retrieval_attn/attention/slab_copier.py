"""Brings slabs home from the device they were built on, while the next ones are built."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from vllm_retrieval_attn.workers.slab_work import Write

_THREADS = 4
"""For one copy: most of its time goes to memory that is touched for the first time."""


class SlabCopier:
    """Through two buffers, pinned for a GPU, by a thread of its own.

    Args:
        write: puts slabs where they belong, called from several threads. device: where they come from.
    """

    def __init__(self, write: Write, device: torch.device) -> None:
        self._write, self._pinned = write, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "retrieval-slab-copier")
        self._writers = ThreadPoolExecutor(_THREADS, "retrieval-slab-writer")
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._under_way: list[Future[None] | None] = [None, None]
        self._turn = 0
        self._since: list[Future[None]] = []

    def __call__(self, starts: list[int], slabs: torch.Tensor) -> None:
        """Copy slabs (n, slab_bytes). Waits for the device, and for the copy before the last."""
        self._turn ^= 1
        home = self._buffer(self._turn, slabs).copy_(slabs)
        copying = self._under_way[self._turn] = self._thread.submit(self._write_parts, starts, home)
        self._since.append(copying)

    def _write_parts(self, starts: list[int], home: torch.Tensor) -> None:
        size = -(-len(starts) // _THREADS)
        firsts = range(0, len(starts), size)
        for _ in self._writers.map(lambda i: self._write(starts[i : i + size], home[i : i + size]), firsts):
            pass

    def prepare(self, slabs: torch.Tensor) -> None:
        """Have buffers for such slabs: pinning memory takes a while."""
        for turn in range(2):
            self._buffer(turn, slabs)

    def _buffer(self, turn: int, slabs: torch.Tensor) -> torch.Tensor:
        if (copying := self._under_way[turn]) is not None:
            wait([copying])
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < len(slabs):
            buffer = self._buffers[turn] = torch.empty(slabs.shape, dtype=slabs.dtype, pin_memory=self._pinned)
        return buffer[: len(slabs)]

    def then(self, landed: Callable[[BaseException | None], None]) -> None:
        """Have ``landed`` called, by the copying thread, once the slabs since the last such call are where they
        belong; with the error if one failed."""
        copies, self._since = self._since, []

        def tell() -> None:
            errors = [copy.exception() for copy in copies]  # done: one thread takes one after the other
            landed(next((error for error in errors if error is not None), None))

        self._thread.submit(tell)

    def drain(self) -> None:
        """Wait until nothing is copied any more, and forget what was."""
        wait(self._since)
        self._since = []

    def close(self) -> None:
        """Wait for the copy under way; drop those that have not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown()
