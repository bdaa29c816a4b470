# SPDX-License-Identifier: Apache-2.0
"""Patches that a start of vLLM needs; the others are shown by the engine tests."""

import multiprocessing
import os
import signal
import threading
import weakref
from multiprocessing.connection import Connection

import pytest
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher
from vllm.v1.engine.utils import CoreEngineProcManager

from vllm_retrieval_attn.plugin import compat
from vllm_retrieval_attn.store.shared_file import SharedFile


def test_vllms_scan_of_modules_passes_with_numba_loaded():
    import numba  # noqa: F401  # loads llvmlite

    compat.install()
    if current_platform.is_cpu():
        assert getattr(dispatcher._rebind_kernels, compat._MARK)
    dispatcher._rebind_kernels([])


def engine(answer: Connection, seconds: float) -> None:
    """Stands for an engine: owns a shared file, takes some seconds to end once asked to."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    file = SharedFile.create(1 << 16, 0)
    answer.send(file.path)
    while not asked.wait(0.05):
        pass
    threading.Event().wait(seconds)
    file.close()


@pytest.mark.parametrize(("seconds", "grace", "code"), [(0.5, 60.0, 0), (60, 3.0, -signal.SIGKILL)])
def test_an_engine_has_time_to_end_and_leaves_no_file_even_if_killed(seconds, grace, code, monkeypatch):
    compat.install()
    monkeypatch.setattr(compat, "END_GRACE_S", grace)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=engine, args=(there, seconds), name="engine")
    process.start()
    assert here.poll(300)
    path = here.recv()
    assert os.path.exists(path)
    manager = CoreEngineProcManager.__new__(CoreEngineProcManager)
    manager.manager_stopped = threading.Event()
    manager.processes, manager._request_shutdown_timeout, manager._retrieval = [process], 0, True
    manager._finalizer = weakref.finalize(manager, print)
    manager.shutdown(timeout=0)
    process.join(10)
    assert process.exitcode == code
    assert not os.path.exists(path)
