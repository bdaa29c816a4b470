# SPDX-License-Identifier: Apache-2.0
"""Engines that tests look at from outside: processes, started ahead, each on a core of its own.

An engine starts for half a minute and computes for minutes on a small machine. So one runs beside the tests that want
none of them, and two as soon as only tests are left that do. A module that wants some has a function
``engine_runs(folder)``.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

LIMIT_S = 1500
ROOT = Path(__file__).parents[1]
_Popen, _ENVIRON = subprocess.Popen, dict(os.environ)
"""As they are before any test: what tests beside this put in their places, and where they go, is not for engines."""


@dataclass(frozen=True)
class EngineRun:
    """``python -m module *arguments``, which writes JSON to ``out``. ``seconds``: about how long; longest go first.
    ``cores``: 2 for two ranks, which start when both cores are free."""

    seconds: int
    out: Path
    module: str
    arguments: tuple[str, ...]
    cores: int = 1


_several = threading.Lock()
"""Held by who waits for more than one core: two that have one each would wait for ever."""


def run(item: EngineRun, cores: "Queue[int]", several: threading.Lock = _several) -> Any:
    with several:
        taken = [cores.get() for _ in range(item.cores)]
    try:
        process = _Popen(
            [sys.executable, "-m", item.module, *item.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**_ENVIRON, "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, taken)), "OMP_NUM_THREADS": "1"},
        )
        try:
            out, errors = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    finally:
        for core in taken:
            cores.put(core)
    assert process.returncode == 0, out[-3000:] + errors[-3000:]
    return json.loads(item.out.read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for engines come last."""
    items.sort(key=lambda item: "engine_run" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Future[Any]], Callable[[], None]]]:
    """The runs of all selected modules by name, and what to call when the tests leave the second core."""
    folder = tmp_path_factory.mktemp("engines")
    wanted: dict[str, EngineRun] = {}
    for module in dict.fromkeys(item.module for item in request.session.items):
        wanted.update(getattr(module, "engine_runs", lambda folder: {})(folder))
    cores: Queue[int] = Queue()
    first, *others = sorted(os.sched_getaffinity(0))
    cores.put(first)
    with ThreadPoolExecutor(2) as pool:
        longest_first = sorted(wanted.items(), key=lambda pair: -pair[1].seconds)
        runs = {name: pool.submit(run, item, cores) for name, item in longest_first}
        yield runs, lambda: cores.put(others.pop()) if others else None
        for core in others:  # nobody asked for one; a run that waits for two may wait no longer
            cores.put(core)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def engine_run(started: tuple[dict[str, Future[Any]], Callable[[], None]]) -> Callable[[str], Any]:
    """What the run of that name wrote."""
    runs, second_core = started
    second_core()
    return lambda name: runs[name].result()
