# SPDX-License-Identifier: Apache-2.0
"""CPU workers in a Ray that runs already (`ray_address`), as in the pod of a RayCluster: they come and go, it stays."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vllm_retrieval_attn.bench.http import free_port
from vllm_retrieval_attn.bench.search import LayerSearch


@pytest.fixture
def ray(tmp_path_factory, monkeypatch):
    """Address of a Ray on loopback that wants a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder, port = tmp_path_factory.mktemp("r"), free_port()
    log = folder / "log"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--num-cpus=1", "--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=80000000",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 1800
    while "block forever" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield f"127.0.0.1:{port}", process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def await_that(condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_live_in_it_and_leave_it_running(ray):
    address, process = ray
    search = LayerSearch((2, 2, 64), 4096, 1, {"ray_address": address, "threads": 1})
    try:
        for wait_s in (0.0, 1.0):  # one that dies before it said that it lives was not missed once
            (pid,) = search.pool.pids()
            assert process.pid in [one.pid for one in psutil.Process(pid).parents()]
            time.sleep(wait_s)
            os.kill(pid, signal.SIGKILL)
            await_that(lambda gone=pid: search.pool.pids() != [gone] and search.pool.alive())
        (pid,) = search.pool.pids()
    finally:
        search.close()
    await_that(lambda: not psutil.pid_exists(pid))
    assert process.poll() is None
