# SPDX-License-Identifier: Apache-2.0
"""Where caches go when there is no home, or one that can not be written; and what Numba's depend on."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import vllm_retrieval_attn
from vllm_retrieval_attn.core import caches

PACKAGE = Path(vllm_retrieval_attn.__file__).parent
SUM = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "import numpy as np; from vllm_retrieval_attn.workers.sync import full_fence; full_fence();"
    "from vllm_retrieval_attn.core.caches import cache_folder, keep_compiled;"
    "print(keep_compiled(), cache_folder(), sep='\\n')"
)


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("VLLM_RETRIEVAL_CACHE", "NUMBA_CACHE_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_that_is_asked_for_or_the_homes(clean, monkeypatch):
    monkeypatch.setenv("HOME", str(clean / "home"))
    assert caches.cache_folder() == clean / "home/.cache/vllm-retrieval"
    monkeypatch.setenv("VLLM_RETRIEVAL_CACHE", str(clean / "other"))
    assert caches.cache_folder() == clean / "other"


@pytest.mark.parametrize("home", ["/proc/nowhere", "", None])
def test_without_a_home_that_can_be_written_a_private_folder(clean, monkeypatch, home):
    monkeypatch.setattr(os.path, "expanduser", lambda path: home if home is not None else path)
    folder = caches.cache_folder()
    assert folder == clean / f"vllm-retrieval-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_could_write_into_is_not_used(clean, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    taken = clean / f"vllm-retrieval-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    assert caches.cache_folder() != taken
    taken.rmdir()
    taken.symlink_to(clean)
    assert caches.cache_folder() != taken


def copied(to):
    """This package's parts that kernels are made of, to be edited."""
    shutil.copytree(PACKAGE, to / "vllm_retrieval_attn", ignore=shutil.ignore_patterns("__pycache__"))
    return to


def compiled(folder, **environment):
    """Folder of compiled code and cache folder, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "NUMBA_CACHE_DIR", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", SUM, str(folder)], env={**kept, **environment}, cwd="/", check=True, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    return tuple(map(Path, done.stdout.split()))


def test_compiled_code_is_found_again_and_not_after_an_edit_of_a_called_module(tmp_path):
    folder = copied(tmp_path / "code")
    place = {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    first, _ = compiled(folder, **place)
    files = {file: file.stat().st_mtime_ns for file in first.rglob("*.nbc")}
    assert files
    again, _ = compiled(folder, **place)
    assert (again, {file: file.stat().st_mtime_ns for file in again.rglob("*.nbc")}) == (first, files)
    with (folder / "vllm_retrieval_attn/index/vector.py").open("a") as source:
        source.write("\n# edited\n")
    assert compiled(folder, **place)[0] != first


def test_code_of_an_image_that_can_not_be_written_is_used_from_a_copy(clean, monkeypatch):
    warm = clean / "image"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(warm))
    folder = warm / f"retrieval-{caches._digest()}"
    folder.mkdir(parents=True)
    (folder / "code.nbc").write_bytes(b"made")
    monkeypatch.setattr(caches, "_writable", lambda path: not path.is_relative_to(warm))
    found = caches.keep_compiled.__wrapped__()
    assert not found.is_relative_to(warm)
    assert (found / "code.nbc").read_bytes() == b"made"
    assert os.environ["NUMBA_CACHE_DIR"] == str(found)
