"""Engines that tests look at from outside: processes, started ahead and two at a time, each with a core of its own.

An engine on a small machine computes on one core and starts for half a minute; one after the other they would take
most of the time of all tests. A module that wants some has a function ``engine_runs(folder)``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

AT_ONCE = 2
LIMIT_S = 1500


@dataclass(frozen=True)
class EngineRun:
    """``python -m module *arguments``, which writes JSON to ``out``. ``seconds``: about how long; longest go first."""

    seconds: int
    out: Path
    module: str
    arguments: tuple[str, ...]


def run(item: EngineRun, cores: "Queue[int]") -> Any:
    core = cores.get()
    try:
        done = subprocess.run(
            [sys.executable, "-m", item.module, *item.arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"},
        )
    finally:
        cores.put(core)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(item.out.read_text())


@pytest.fixture(scope="session")
def engine_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Any]]:
    """What the run of that name wrote, of all that the selected modules have."""
    folder = tmp_path_factory.mktemp("engines")
    wanted: dict[str, EngineRun] = {}
    for module in dict.fromkeys(item.module for item in request.session.items):
        wanted.update(getattr(module, "engine_runs", lambda folder: {})(folder))
    cores: Queue[int] = Queue()
    usable = sorted(os.sched_getaffinity(0))
    for core in (usable * AT_ONCE)[:AT_ONCE]:
        cores.put(core)
    pool = ThreadPoolExecutor(AT_ONCE)
    runs: dict[str, Future[Any]] = {
        name: pool.submit(run, item, cores) for name, item in sorted(wanted.items(), key=lambda pair: -pair[1].seconds)
    }
    yield lambda name: runs[name].result()
    pool.shutdown(cancel_futures=True)
