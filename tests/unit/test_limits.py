# SPDX-License-Identifier: Apache-2.0
"""Limits of control groups, made up."""

import psutil
import pytest

from vllm_retrieval_attn.core.limits import available_cpus, available_memory

G = 10**9


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A tree of groups: a function that writes files of one, and one that asks."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * G}))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    own = tmp_path / "cgroup"

    def write(path, **files):
        folder = tmp_path / "fs" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(text)

    def ask(what, path="/"):
        own.write_text(f"0::{path}\n")
        return what(tmp_path / "fs", own)

    return write, ask


def test_without_limits_the_machine_counts(group):
    write, ask = group
    assert ask(available_memory) == 100 * G
    assert ask(available_cpus) == 16
    write("", memory_max="max\n", memory_current=f"{5 * G}\n", cpu_max="max 100000\n")
    assert (ask(available_memory), ask(available_cpus)) == (100 * G, 16)


def test_caches_of_files_count_as_free(group):
    """A limit of 20 GB, 17 of it page cache: seen as 0.8 GB free."""
    write, ask = group
    stat = f"anon {2 * G}\nfile {17 * G}\nshmem 0\ninactive_file {15 * G}\nactive_file {2 * G}\n"
    write("", memory_max=str(20 * G), memory_current=str(int(19.2 * G)), memory_stat=stat)
    assert ask(available_memory) == int(17.8 * G)


def test_shared_memory_does_not(group):
    write, ask = group
    stat = f"anon 0\nfile {10 * G}\nshmem {10 * G}\ninactive_anon {10 * G}\ninactive_file 0\nactive_file 0\n"
    write("", memory_max=str(20 * G), memory_current=str(10 * G), memory_stat=stat)
    assert ask(available_memory) == 10 * G


def test_the_tightest_of_nested_groups_counts(group):
    write, ask = group
    write("", memory_max="max", memory_current="0")
    write("pods", memory_max=str(8 * G), memory_current=str(3 * G), cpu_max="250000 100000")
    write("pods/one", memory_max=str(30 * G), memory_current=str(G), cpu_max="max 100000")
    assert ask(available_memory, "/pods/one") == 5 * G
    assert ask(available_cpus, "/pods/one") == 3
    assert ask(available_cpus, "/elsewhere") == 16


def test_version_1_is_read_too(group):
    write, ask = group
    write("memory", memory_limit_in_bytes=str(9 * G), memory_usage_in_bytes=str(4 * G),
          memory_stat=f"inactive_file 1\ntotal_inactive_file {2 * G}\ntotal_active_file 0\n")  # fmt: skip
    write("cpu", cpu_cfs_quota_us="150000", cpu_cfs_period_us="100000")
    assert ask(available_memory) == 7 * G
    assert ask(available_cpus) == 2
    write("cpu", cpu_cfs_quota_us="-1")
    assert ask(available_cpus) == 16


def test_over_the_limit_nothing_is_free(group):
    write, ask = group
    write("", memory_max=str(G), memory_current=str(2 * G))
    assert ask(available_memory) == 0
