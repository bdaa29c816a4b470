"""The shared-memory file of a rank: made, found, attached and cleaned up.

A file in ``/dev/shm`` where that has the room, else an anonymous memory file that actors open
through ``/proc/PID/fd`` (containers often have 64 MB of ``/dev/shm``). Both are mode 0600 and
sparse: memory is taken when a page is first written. A named file carries the process id and
start time of its owner, so that the next start can remove what a killed owner left.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from vllm_retrieval_attn.store.mapping import map_file

logger = logging.getLogger("vllm.retrieval.memory")

SHM_DIR = Path("/dev/shm")
_PREFIX = "vllm-retrieval"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-r\d+")


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is none such (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def remove_stale(directory: Path = SHM_DIR, owners: Collection[int] = (), timeout_s: float = 0.0) -> list[str]:
    """Remove the files of owners that are gone; returns their names.

    Args:
        owners: process ids that are about to go. timeout_s: how long to wait for them while they have files.
    """
    removed = []
    deadline = time.monotonic() + timeout_s
    while True:
        waiting = False
        for path in directory.glob(f"{_PREFIX}-*"):
            match = _NAME.fullmatch(path.name)
            if match and process_start(int(match[1])) != int(match[2]):
                path.unlink(missing_ok=True)
                removed.append(path.name)
            elif match:
                waiting = waiting or int(match[1]) in owners
        if not waiting or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if removed:
        logger.info("retrieval: removed shared memory of a killed server: %s", ", ".join(removed))
    return removed


class SharedFile:
    """A mapped shared-memory file.

    Attributes:
        path: what another process of the same user opens to attach.
        map: the whole file, mapped read-write, as bytes; None once closed.
    """

    def __init__(self, fd: int, path: str, named: Path | None) -> None:
        self.path = path
        self._named = named
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self.map = map_file(fd, self.size)

    @classmethod
    def create(cls, size: int, rank: int, directory: Path = SHM_DIR) -> "SharedFile":
        """Make a file of ``size`` bytes for ``rank`` of this process, after removing stale ones."""
        remove_stale(directory)
        pid = os.getpid()
        if directory.is_dir() and shutil.disk_usage(directory).free >= size:
            named = directory / f"{_PREFIX}-{pid}-{process_start(pid)}-r{rank}"
            named.unlink(missing_ok=True)
            fd = os.open(named, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            path = str(named)
        else:
            named = None
            fd = os.memfd_create(f"{_PREFIX}-r{rank}", os.MFD_CLOEXEC)
            os.fchmod(fd, 0o600)
            path = f"/proc/{pid}/fd/{fd}"
            logger.info("retrieval: %s is too small for %.1f GB, using an anonymous memory file", directory, size / 1e9)
        os.ftruncate(fd, size)
        return cls(fd, path, named)

    @classmethod
    def attach(cls, path: str) -> "SharedFile":
        """Map the file that another process made."""
        return cls(os.open(path, os.O_RDWR), path, None)

    def close(self) -> None:
        """Remove the name (owner) and close; the mapping lives on while arrays still refer to it."""
        if self._named is not None:
            self._named.unlink(missing_ok=True)
            self._named = None
        self.map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
