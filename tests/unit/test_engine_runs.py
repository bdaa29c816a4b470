# SPDX-License-Identifier: Apache-2.0
"""Engines that run beside tests start as if these did nothing."""

import subprocess
import threading
from queue import Queue

from tests.engines import EngineRun, run


def test_what_a_test_puts_in_place_does_not_reach_an_engine(tmp_path, monkeypatch):
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    given.write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(subprocess, "Popen", None)
    cores = Queue()
    cores.put(0)
    assert run(EngineRun(1, out, "json.tool", (str(given), str(out))), cores, threading.Lock()) == [1, 2]
    assert cores.get_nowait() == 0
