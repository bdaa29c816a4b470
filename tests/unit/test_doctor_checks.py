# SPDX-License-Identifier: Apache-2.0
"""The doctor's verdicts, each on a machine that is made up."""

import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from vllm_retrieval_attn.cli import app
from vllm_retrieval_attn.core import config
from vllm_retrieval_attn.doctor import checks
from vllm_retrieval_attn.doctor.checks import Check, Verdict
from vllm_retrieval_attn.plugin.version import VLLM

GB = 10**9


def card(major, name="NVIDIA H100", memory=80 * GB):
    return SimpleNamespace(major=major, name=name, total_memory=memory)


def set_cuda(monkeypatch, cards, driver="580.159.03"):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: cards[number])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(checks, "_driver", lambda: driver)


def files(monkeypatch, tmp_path, name, text):
    path = tmp_path / "file"
    path.write_text(text)
    monkeypatch.setattr(checks, name, path)


def set_memory(monkeypatch, free, promised):
    for module in (checks, config):
        monkeypatch.setattr(module, "available_memory", lambda: free)
    monkeypatch.setattr(checks, "promised", lambda: promised)


CASES = {
    "no vLLM": (checks.packages, lambda m, t: m.setattr(checks, "_version", {"torch": "2"}.get), Verdict.STOP,
                "pip install vllm"),
    "another vLLM": (checks.packages, lambda m, t: m.setattr(checks, "_version", lambda name: "0.31.0"),
                     Verdict.STOP, "install vLLM 0.32 or 0.33"),
    "an old GPU": (checks.gpu, lambda m, t: set_cuda(m, [card(7)]), Verdict.STOP, "Ampere"),
    "an old driver": (checks.gpu, lambda m, t: set_cuda(m, [card(9)], "550.54"), Verdict.WARN, "driver 580"),
    "a good GPU": (checks.gpu, lambda m, t: set_cuda(m, [card(9)]), Verdict.OK, ""),
    "no memory": (checks.memory, lambda m, t: set_memory(m, 3 * GB, 0), Verdict.STOP, "memory limit"),
    "memory promised away": (checks.memory, lambda m, t: set_memory(m, 30 * GB, 28 * GB), Verdict.STOP,
                             "memory limit"),
    "memlock": (checks.pinned, lambda m, t: m.setattr(resource, "getrlimit", lambda what: (65536, 65536)),
                Verdict.OK, ""),
    "a small /dev/shm": (checks.shm, lambda m, t: m.setattr(
        checks.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1000, f_frsize=4096)), Verdict.WARN, "--shm-size"),
    "no /dev/shm": (checks.shm, lambda m, t: m.setattr(checks.os, "statvfs", _raise), Verdict.STOP, "tmpfs"),
    "a quota": (checks.cpus, lambda m, t: (m.setattr(checks.os, "sched_getaffinity", lambda pid: set(range(16))),
                                           m.setattr(checks, "available_cpus", lambda: 4)), Verdict.WARN, "static CPU"),
    "one CPU": (checks.cpus, lambda m, t: (m.setattr(checks.os, "sched_getaffinity", lambda pid: {0}),
                                           m.setattr(checks, "available_cpus", lambda: 1)), Verdict.WARN, "two"),
    "no home": (checks.home, lambda m, t: m.setattr(checks, "cache_folder", lambda: Path(tempfile.gettempdir(), "x")),
                Verdict.WARN, "VLLM_RETRIEVAL_CACHE"),
    "a cache that can not be written": (checks.numba, lambda m, t: (
        m.setenv("NUMBA_CACHE_DIR", str(t)), m.setattr(checks.os, "access", lambda path, how: False)), Verdict.WARN,
        "NUMBA_CACHE_DIR"),
    "Yama": (checks.attaching, lambda m, t: files(m, t, "_PTRACE", "2\n"), Verdict.WARN, "ptrace_scope"),
    "no Yama": (checks.attaching, lambda m, t: m.setattr(checks, "_PTRACE", t / "none"), Verdict.OK, ""),
    "no huge pages": (checks.huge_pages, lambda m, t: (
        files(m, t, "_HUGE_SHMEM", "always within_size advise [never] deny force"),
        m.setattr(checks.platform, "release", lambda: "5.15.0")), Verdict.WARN, "Linux 6.1"),
    "huge pages": (checks.huge_pages, lambda m, t: files(m, t, "_HUGE_SHMEM", "[advise] never"), Verdict.OK, ""),
    "another system": (checks.processor, lambda m, t: m.setattr(checks.platform, "system", lambda: "Darwin"),
                       Verdict.STOP, "Linux"),
}  # fmt: skip


def _raise(path):
    raise FileNotFoundError(path)


@pytest.mark.parametrize("name", CASES)
def test_a_verdict_and_what_to_do(name, monkeypatch, tmp_path):
    check, make, verdict, do = CASES[name]
    make(monkeypatch, tmp_path)
    found = check()
    assert (found.verdict, bool(found.do)) == (verdict, verdict is not Verdict.OK)
    assert do in found.do


def test_every_check_runs_here_and_none_stops(monkeypatch):
    set_memory(monkeypatch, 100 * GB, 0)  # engines run beside
    found = list(checks.checks())
    assert len({check.name for check in found}) == len(found) == 12
    assert not [check for check in found if check.verdict is Verdict.STOP]


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.OK, 0), (Verdict.WARN, 0), (Verdict.STOP, 1)])
def test_the_command_ends_with_1_where_something_is_in_the_way(verdict, code, monkeypatch):
    monkeypatch.setattr(checks, "checks", lambda: [Check("thing", verdict, "so", "mend it")])
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code
    assert verdict.value in done.output
    assert "mend it" in done.output


def test_the_version_is_told():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert "for vLLM 0.32 or 0.33" in done.output
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"vllm>={VLLM[0]},<0.34"' in project
