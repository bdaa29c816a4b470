# SPDX-License-Identifier: Apache-2.0
"""The shared-memory file: private, found by others, gone with its last user."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np

from vllm_retrieval_attn.store import shared_file
from vllm_retrieval_attn.store.shared_file import SharedFile, process_start, promised

SIZE = 1 << 16


def dead_process() -> int:
    """Process id of a process that is gone."""
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    return child.pid


def test_a_file_is_private_and_has_no_name_that_others_could_meet():
    file = SharedFile.create(SIZE, 3)
    assert file.path.startswith(f"/proc/{os.getpid()}/fd/")
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    assert os.stat(file.path).st_size == file.size == SIZE
    assert re.fullmatch(r"/memfd:\S+ \(deleted\)", os.readlink(file.path))  # in no folder: /dev/shm neither
    file.close()
    assert not os.path.exists(file.path)
    file.close()


def test_close_with_arrays_alive_keeps_the_arrays():
    file = SharedFile.create(SIZE, 0)
    array = np.frombuffer(file.map, np.uint8)
    array[5] = 7
    file.close()
    assert array[5] == 7


def test_attached_files_share_memory():
    file = SharedFile.create(SIZE, 0)
    other = SharedFile.attach(file.path)
    file.map[10:13] = b"abc"
    assert other.map[10:13] == b"abc"
    other.close()
    assert Path(file.path).exists()
    file.close()


def test_files_of_one_process_are_apart():
    first, second = SharedFile.create(SIZE, 0), SharedFile.create(SIZE, 0)
    first.map[0:1] = b"x"
    assert second.map[0:1] == b"\0"
    second.close()
    first.close()


def test_another_process_attaches():
    file = SharedFile.create(SIZE, 0)
    code = (
        "import sys; from vllm_retrieval_attn.store.shared_file import SharedFile;"
        "SharedFile.attach(sys.argv[1]).map[0:5] = b'hello'"
    )
    subprocess.run([sys.executable, "-c", code, file.path], check=True, timeout=60)
    assert file.map[0:5] == b"hello"
    file.close()


def test_memory_that_was_promised_and_not_taken_is_known_to_others(tmp_path):
    def promised_by(process: subprocess.Popen) -> int:  # others' files come and go: engines run beside this
        (tmp_path / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        return promised(tmp_path)

    owner = subprocess.Popen(
        [
            sys.executable, "-c",
            "from vllm_retrieval_attn.store.shared_file import SharedFile;"
            f"file = SharedFile.create({64 << 20}, 0); file.map[0:{16 << 20}] = bytes({16 << 20});"
            "print('there', flush=True); input()",
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout.readline() == "there\n"
    assert promised() >= promised_by(owner) == 48 << 20
    owner.kill()  # as the kernel kills where memory is short: nothing is left to clear up
    owner.wait()
    assert promised(tmp_path) == 0


def test_process_start_tells_living_from_dead_and_zombie():
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(dead_process()) is None
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert shared_file.process_start(child.pid) is None
    child.wait()
