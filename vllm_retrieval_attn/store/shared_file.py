# SPDX-License-Identifier: Apache-2.0
"""The shared-memory file of a rank: an anonymous memory file, which other processes of the user open through ``/proc``.

It has no name in ``/dev/shm``: a container's is often 64 MB, or shared with others whose process ids mean nothing here,
and what a killed owner left there would stay. This one goes with the last process that maps it. It is sparse: memory is
taken when a page is first written.
"""

import contextlib
import os
from pathlib import Path

from vllm_retrieval_attn.store.mapping import map_file

_NAME = "vllm-retrieval"
_BLOCK = 512  # of st_blocks


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is none such (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def promised(processes: Path = Path("/proc")) -> int:
    """Bytes that files of this kind, of all ``processes`` seen there, have yet to take: memory that looks free."""
    sizes: dict[int, int] = {}
    for process in processes.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(f"/memfd:{_NAME}-"):
                        found = link.stat()
                        sizes[found.st_ino] = max(0, found.st_size - found.st_blocks * _BLOCK)
    return sum(sizes.values())


class SharedFile:
    """A mapped shared-memory file.

    Attributes:
        path: what another process of the same user opens to attach.
        map: the whole file, mapped read-write, as bytes; None once closed.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self.map = map_file(fd, self.size)

    @classmethod
    def create(cls, size: int, rank: int) -> "SharedFile":
        """Make a file of ``size`` bytes for ``rank`` of this process."""
        fd = os.memfd_create(f"{_NAME}-r{rank}", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        return cls(fd, f"/proc/{os.getpid()}/fd/{fd}")

    @classmethod
    def attach(cls, path: str) -> "SharedFile":
        """Map the file that another process made."""
        return cls(os.open(path, os.O_RDWR), path)

    def close(self) -> None:
        """Close; the mapping lives on while arrays still refer to it."""
        self.map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
