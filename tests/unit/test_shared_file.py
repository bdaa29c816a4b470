"""The shared-memory file: private, removed with its owner, found by others."""

import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from vllm_retrieval_attn.store import shared_file
from vllm_retrieval_attn.store.shared_file import SharedFile, process_start, remove_stale

SIZE = 1 << 16


@pytest.fixture
def small_directory(monkeypatch):
    """Every directory has too little room."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(SIZE, 1, SIZE - 1))


def name_of(pid: int, started: int, rank: int = 0) -> str:
    return f"vllm-retrieval-{pid}-{started}-r{rank}"


def dead_process() -> tuple[int, int]:
    """Process id and start time of a process that is gone."""
    child = subprocess.Popen(["sleep", "60"])
    started = process_start(child.pid)
    child.kill()
    child.wait()
    return child.pid, started


def test_a_named_file_is_private_and_carries_its_owner(tmp_path):
    file = SharedFile.create(SIZE, 3, tmp_path)
    assert Path(file.path) == tmp_path / name_of(os.getpid(), process_start(os.getpid()), 3)
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    assert os.stat(file.path).st_size == file.size == SIZE
    file.close()


def test_close_removes_the_name_and_may_be_called_twice(tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path)
    file.close()
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_close_with_arrays_alive_removes_the_name_and_keeps_the_arrays(tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path)
    array = np.frombuffer(file.map, np.uint8)
    array[5] = 7
    file.close()
    assert list(tmp_path.iterdir()) == []
    assert array[5] == 7


def test_attached_files_share_memory_and_do_not_own_the_name(tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path)
    other = SharedFile.attach(file.path)
    file.map[10:13] = b"abc"
    assert other.map[10:13] == b"abc"
    other.close()
    assert Path(file.path).exists()
    file.close()


def test_creating_again_replaces_the_file_of_the_same_owner(tmp_path):
    first = SharedFile.create(SIZE, 0, tmp_path)
    first.map[0:1] = b"x"
    second = SharedFile.create(SIZE, 0, tmp_path)
    assert second.map[0:1] == b"\0"
    assert len(list(tmp_path.iterdir())) == 1
    second.close()
    first.close()


def test_the_file_of_a_dead_process_is_removed(tmp_path):
    stale = name_of(*dead_process())
    (tmp_path / stale).touch()
    assert remove_stale(tmp_path) == [stale]
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_reused_process_id_is_removed(tmp_path):
    stale = name_of(os.getpid(), process_start(os.getpid()) - 1)
    (tmp_path / stale).touch()
    assert remove_stale(tmp_path) == [stale]


def test_files_of_living_owners_and_of_others_stay(tmp_path):
    names = {name_of(os.getpid(), process_start(os.getpid()), 1), "vllm-retrieval-notes", "vllm-retrieval-1-2", "else"}
    for name in names:
        (tmp_path / name).touch()
    assert remove_stale(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == names


def test_create_removes_what_a_killed_owner_left(tmp_path):
    (tmp_path / name_of(*dead_process())).touch()
    file = SharedFile.create(SIZE, 0, tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [file.path]
    file.close()


def test_a_small_directory_gives_a_private_memory_file(small_directory, tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    other = SharedFile.attach(file.path)
    other.map[3:5] = b"hi"
    assert file.map[3:5] == b"hi"
    other.close()
    file.close()
    assert not os.path.exists(file.path)


def test_another_process_attaches_to_a_memory_file(small_directory, tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path)
    code = (
        "import sys; from vllm_retrieval_attn.store.shared_file import SharedFile;"
        "SharedFile.attach(sys.argv[1]).map[0:5] = b'hello'"
    )
    subprocess.run([sys.executable, "-c", code, file.path], check=True, timeout=60)
    assert file.map[0:5] == b"hello"
    file.close()


def test_a_missing_directory_gives_a_memory_file(tmp_path):
    file = SharedFile.create(SIZE, 0, tmp_path / "none")
    assert file.path.startswith(f"/proc/{os.getpid()}/fd/")
    file.close()


def test_process_start_tells_living_from_dead_and_zombie():
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(dead_process()[0]) is None
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert shared_file.process_start(child.pid) is None
    child.wait()


def test_the_file_of_an_owner_that_is_about_to_go_is_waited_for(tmp_path):
    owner = subprocess.Popen(["sleep", "0.5"])
    stays = subprocess.Popen(["sleep", "60"])
    try:
        names = [name_of(process.pid, process_start(process.pid)) for process in (owner, stays)]
        for name in names:
            (tmp_path / name).write_bytes(b"x")
        assert remove_stale(tmp_path, {stays.pid}, 0.2) == []
        assert remove_stale(tmp_path, {owner.pid}, 20) == names[:1]
        assert [file.name for file in tmp_path.iterdir()] == names[1:]
    finally:
        stays.kill()
        stays.wait()
        owner.wait()
