# SPDX-License-Identifier: Apache-2.0
"""What `vllm-retrieval doctor` finds on a machine or in a container, with a verdict and what to do.

*stop*: a server does not start, or not well. *warn*: it starts, and something is worse than it could be.
"""

import importlib.metadata
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import psutil

from vllm_retrieval_attn.core.caches import cache_folder
from vllm_retrieval_attn.core.config import GB, default_host_memory_gb
from vllm_retrieval_attn.core.limits import available_cpus, available_memory
from vllm_retrieval_attn.index.scan import CAN_SCAN
from vllm_retrieval_attn.plugin.version import VLLM
from vllm_retrieval_attn.store.shared_file import promised
from vllm_retrieval_attn.workers.sync import FUTEX_NUMBER

_LEAST_SHM = 64 << 20
_LEAST_DRIVER = 580
"""Of CUDA 13, which vLLM's wheels are built with."""
_HUGE_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope")


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"
    STOP = "stop"


class Check(NamedTuple):
    """``found``: how it is. ``do``: what to do, empty where nothing is."""

    name: str
    verdict: Verdict
    found: str
    do: str = ""


def checks() -> Iterator[Check]:
    """All of them, in the order in which they matter."""
    folders: tuple[Callable[[], Check], ...] = (home, numba, ray_folder) if _temporary() else (no_temporary,)
    every = (processor, packages, gpu, memory, pinned, shm, cpus, *folders, attaching, huge_pages)
    for check in every:
        yield check()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> Check:
    found = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    if FUTEX_NUMBER < 0 or platform.system() != "Linux":
        return Check("machine", Verdict.STOP, found, "serve on Linux with an x86_64 or aarch64 processor")
    return Check("machine", Verdict.OK, f"{found}, {'with' if CAN_SCAN else 'without'} AVX-512 VNNI")


def packages() -> Check:
    versions = {name: _version(name) for name in ("vllm", "torch", "ray", "faiss-cpu", "numba")}
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Check("packages", Verdict.STOP, found, f"pip install {' '.join(missing)}")
    if not str(versions["vllm"]).startswith(tuple(f"{version}." for version in VLLM)):
        wanted = " or ".join(VLLM)
        return Check("packages", Verdict.STOP, found, f"install vLLM {wanted}, which this version is written for")
    return Check("packages", Verdict.OK, found)


def gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists():
            return Check(
                "GPU", Verdict.STOP, "there, and torch does not see it",
                "install the CUDA build of torch, and see that the driver and the container's device plugin work",
            )  # fmt: skip
        return Check("GPU", Verdict.OK, "none: vLLM's CPU build serves")
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found = ", ".join(f"{card.name} {card.total_memory / GB:.0f} GB" for card in cards)
    driver = _driver()
    found += f", driver {driver}" if driver else ""
    if any(card.major < 8 for card in cards):
        return Check("GPU", Verdict.STOP, found, "use an Ampere or newer GPU: FlashAttention needs one")
    if driver and int(driver.partition(".")[0]) < _LEAST_DRIVER and str(torch.version.cuda or "").startswith("13"):
        return Check("GPU", Verdict.WARN, found, f"CUDA {torch.version.cuda} wants driver {_LEAST_DRIVER} or newer")
    return Check("GPU", Verdict.OK, found)


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def memory() -> Check:
    free, spoken_for = available_memory(), promised()
    most = default_host_memory_gb(spoken_for)
    found = f"{psutil.virtual_memory().total / GB:.1f} GB, {free / GB:.1f} GB may be taken"
    found += f", {spoken_for / GB:.1f} GB promised to other servers" if spoken_for else ""
    if most <= 0:
        return Check("memory", Verdict.STOP, found, "free some, or raise the container's memory limit (4 GB stay free)")
    return Check("memory", Verdict.OK, f"{found}; host_memory_gb is {most:.1f} by default")


def pinned() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("pinned memory", Verdict.OK, "no limit")
    return Check(
        "pinned memory", Verdict.OK, f"memlock {soft / 1e6:.0f} MB, which CUDA's pinned memory does not count in"
    )


def shm() -> Check:
    """vLLM and Ray want a little; host memory does not lie there."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return Check("/dev/shm", Verdict.STOP, "there is none", "mount a tmpfs there (docker: --shm-size 1g)")
    if not os.access("/dev/shm", os.W_OK):
        return Check("/dev/shm", Verdict.STOP, "it can not be written", "mount it writable: vLLM and Ray need it")
    free = found.f_bavail * found.f_frsize
    if free < _LEAST_SHM:
        return Check(
            "/dev/shm", Verdict.WARN, f"{free / 1e6:.0f} MB free",
            "give vLLM and Ray more (docker: --shm-size 1g); host memory is not taken from it",
        )  # fmt: skip
    return Check("/dev/shm", Verdict.OK, f"{free / 1e6:.0f} MB free; host memory is not taken from it")


def cpus() -> Check:
    here, may = len(os.sched_getaffinity(0)), available_cpus()
    found = f"{may} CPUs' time" if may < here else f"{here} CPUs"
    if may < here:
        return Check(
            "CPUs", Verdict.WARN, f"{found} on {here} of them",
            "a quota makes threads wait all together; pin whole CPUs instead (Kubernetes: static CPU manager)",
        )  # fmt: skip
    if here < 2:
        return Check("CPUs", Verdict.WARN, found, "give it two or more: vLLM and the CPU workers take turns on one")
    return Check("CPUs", Verdict.OK, found)


def _temporary() -> str | None:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return None


def no_temporary() -> Check:
    return Check(
        "temporary folder", Verdict.STOP, "none can be written",
        "mount a writable /tmp, or set TMPDIR: vLLM and Ray have their sockets there",
    )  # fmt: skip


def home() -> Check:
    folder, asked = cache_folder(), os.environ.get("VLLM_RETRIEVAL_CACHE")
    if asked and folder != Path(asked):
        return Check(
            "cache", Verdict.WARN, f"{folder}: VLLM_RETRIEVAL_CACHE={asked} is no absolute folder that can be written",
            "set VLLM_RETRIEVAL_CACHE to one, or each start learns and compiles anew",
        )  # fmt: skip
    if not asked and folder.is_relative_to(tempfile.gettempdir()):
        return Check(
            "cache", Verdict.WARN, f"{folder}: there is no home that can be written",
            "set VLLM_RETRIEVAL_CACHE to a folder that stays, or each start learns and compiles anew",
        )  # fmt: skip
    return Check("cache", Verdict.OK, str(folder))


def numba() -> Check:
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and not os.access(given, os.W_OK) and Path(given).exists():
        return Check(
            "compiled code", Verdict.WARN, f"{given} can not be written: a copy is used",
            "set NUMBA_CACHE_DIR to a folder that can be, or what is compiled is lost with the container",
        )  # fmt: skip
    return Check("compiled code", Verdict.OK, given or str(cache_folder() / "numba"))


def ray_folder() -> Check:
    from vllm_retrieval_attn.workers.supervisor import ray_temp_dir

    folder = Path(ray_temp_dir() or "/tmp/ray")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        return Check("Ray's folder", Verdict.STOP, f"{folder} can not be written", "mount a writable /tmp")
    return Check("Ray's folder", Verdict.OK, str(folder))


def attaching() -> Check:
    """CPU workers read the server's memory where the GPU has codes (store/managed.py)."""
    try:
        scope = int(_PTRACE.read_text())
    except (OSError, ValueError):
        return Check("reading between processes", Verdict.OK, "Yama is not there")
    if scope > 1:
        return Check(
            "reading between processes", Verdict.WARN, f"kernel.yama.ptrace_scope is {scope}",
            "set kernel.yama.ptrace_scope to 1 or 0: on a GPU, CPU workers can not read rows otherwise",
        )  # fmt: skip
    return Check("reading between processes", Verdict.OK, f"kernel.yama.ptrace_scope is {scope}")


def huge_pages() -> Check:
    try:
        text = _HUGE_SHMEM.read_text()
    except OSError:
        return Check("huge pages", Verdict.WARN, "the kernel has none", "reading single rows takes longer without")
    chosen = text.partition("[")[2].partition("]")[0]
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if chosen in ("always", "within_size", "advise", "force") or release >= (6, 1):
        return Check("huge pages", Verdict.OK, f"shmem_enabled is {chosen}; made at start (Linux {platform.release()})")
    return Check(
        "huge pages", Verdict.WARN, f"shmem_enabled is {chosen}, Linux {platform.release()}",
        f"echo advise > {_HUGE_SHMEM}, or use Linux 6.1 or newer: reading single rows takes longer without",
    )  # fmt: skip
