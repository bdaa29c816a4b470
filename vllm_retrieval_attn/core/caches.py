# SPDX-License-Identifier: Apache-2.0
"""Where things are kept from one start to the next: learned spaces, models of the demo, compiled kernels.

Containers run as users without a home, on file systems that cannot be written; everything here then goes to a private
folder that lasts as long as the container, which costs the next start its time and nothing else.
"""

import hashlib
import importlib.metadata
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path

_COMPILED = ("core", "index", "sketch", "workers")
"""Packages whose sources make the compiled kernels."""


def cache_folder() -> Path:
    """``VLLM_RETRIEVAL_CACHE``, or ``~/.cache/vllm-retrieval``; where that can not be written, a private temporary
    folder of this user."""
    asked = os.environ.get("VLLM_RETRIEVAL_CACHE")
    wanted = Path(asked) if asked else Path(os.path.expanduser("~"), ".cache", "vllm-retrieval")
    if wanted.is_absolute() and _writable(wanted):  # no home: "~" stays as it is
        return wanted
    return _private()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private() -> Path:
    """A folder that is this user's alone: what lies in it is executed.

    Raises:
        OSError: there is no place for one.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"vllm-retrieval-{os.getuid()}")
    except FileNotFoundError:
        raise OSError(
            "retrieval: neither a cache folder nor a temporary one can be written; mount a writable /tmp, or set TMPDIR"
        ) from None
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="vllm-retrieval-"))


@cache
def keep_compiled() -> Path:
    """Have Numba keep its code in a folder that is named by the sources: it looks at the file of a function, not at
    those of the functions that it calls. To be called before any is made.

    Returns:
        The folder: within ``NUMBA_CACHE_DIR`` where that is set, else within :func:`cache_folder`.
    """
    import numba

    given = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(given) if given else cache_folder() / "numba"
    if not folder.name.startswith("retrieval-"):  # set by a process that started this one
        folder = folder / f"retrieval-{_digest()}"
    if not _writable(folder):  # an image's, on a file system that can not be written: Numba wants to
        warm, folder = folder, _private() / "numba" / folder.name
        if warm.is_dir() and not folder.is_dir():
            shutil.copytree(warm, folder)
    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(folder)
    return folder


def _digest() -> str:
    package = Path(__file__).parents[1]
    known = hashlib.sha256()
    for name in ("numba", "llvmlite"):
        known.update(importlib.metadata.version(name).encode())
    for part in _COMPILED:
        for file in sorted((package / part).glob("*.py")):
            known.update(file.name.encode() + b"\0" + file.read_bytes())
    return known.hexdigest()[:16]
