# SPDX-License-Identifier: Apache-2.0
"""What this process may take of the machine: memory and CPUs, with the limits of its control groups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's control group (version 2) and of those above it; in a container the first is all that
    can be seen."""
    try:
        paths = [line.rpartition(":")[2] for line in own.read_text().splitlines() if line.startswith("0::")]
    except OSError:
        paths = []
    folder = root / (paths[0] if paths else "").strip("/")
    while True:
        yield folder
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # else "max"


def _caches(folder: Path) -> int:
    """Bytes that the system gives back when memory is wanted: caches of files, which a group's use counts."""
    try:
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        numbers = {line[0]: int(line[1]) for line in lines}
    except OSError:
        return 0
    # Version 1 says it with a prefix where groups lie within each other. Shared memory is on neither list.
    prefix = "total_" if "total_inactive_file" in numbers else ""
    return numbers.get(f"{prefix}inactive_file", 0) + numbers.get(f"{prefix}active_file", 0)


def available_memory(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes of RAM that this process may still take."""
    free = psutil.virtual_memory().available
    limits = [(folder, "memory.max", "memory.current") for folder in _groups(root, own)]
    limits.append((root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder, limit_name, used_name in limits:
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None:
            free = min(free, limit - used + _caches(folder))
    return max(0, free)


def available_cpus(root: Path = _ROOT, own: Path = _OWN) -> int:
    """CPUs' worth of time that this process may use: those it may run on, or less where a quota says so."""
    cpus = len(os.sched_getaffinity(0))
    for folder in _groups(root, own):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    quota_us, period_us = (_number(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota_us and period_us:
        cpus = min(cpus, math.ceil(quota_us / period_us))
    return max(1, cpus)
