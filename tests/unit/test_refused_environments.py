# SPDX-License-Identifier: Apache-2.0
"""Environments in which a server can not start, or not as asked: said in one clear line."""

import socket
import sys
import tempfile

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI

from tests.one_line import assert_clear
from vllm_retrieval_attn.core import caches, config
from vllm_retrieval_attn.core.config import GB, RetrievalConfig, resolve
from vllm_retrieval_attn.doctor import checks
from vllm_retrieval_attn.plugin import compat
from vllm_retrieval_attn.plugin.engine_config import check_ray
from vllm_retrieval_attn.serving import keys
from vllm_retrieval_attn.serving.endpoints import RetrievalEndpoints
from vllm_retrieval_attn.workers import supervisor

VIEW, FILE = "RETRIEVAL_VIEW_KEY", "RETRIEVAL_VIEW_KEY_FILE"
KEYS = {
    "empty": ({VIEW: ""}, "RETRIEVAL_VIEW_KEY is empty", "set a key"),
    "blank": ({VIEW: "  "}, "RETRIEVAL_VIEW_KEY is empty", "set a key"),
    "not ASCII": ({VIEW: "schlüssel"}, "RETRIEVAL_VIEW_KEY has characters", "letters and digits"),
    "two lines": ({VIEW: "a\nb"}, "RETRIEVAL_VIEW_KEY has characters", "letters and digits"),
    "both": ({VIEW: "a", FILE: "key"}, FILE, "set one of"),
    "no file": ({FILE: "nowhere"}, "can not be read: No such file", "name a file"),
    "a folder": ({FILE: "."}, "can not be read: Is a directory", "name a file"),
    "an empty file": ({FILE: "empty"}, "is empty", "set a key"),
    "a binary file": ({FILE: "binary"}, "has characters", "letters and digits"),
    "the other's": ({VIEW: "one", "RETRIEVAL_ADMIN_KEY": "one"}, "RETRIEVAL_ADMIN_KEY", "set two keys"),
    "the other's file": ({FILE: "key", "RETRIEVAL_ADMIN_KEY": "secret"}, "RETRIEVAL_ADMIN_KEY", "set two keys"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_can_not_work_stop_the_start(name, monkeypatch, tmp_path):
    given, what, do = KEYS[name]
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    for variable in (VIEW, FILE, "RETRIEVAL_ADMIN_KEY", "RETRIEVAL_ADMIN_KEY_FILE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        RetrievalEndpoints().attach_router(FastAPI())
    assert_clear(str(refused.value), what, do)


def test_a_file_that_may_not_be_read_is_named(monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv(FILE, "/keys/view")
    monkeypatch.setattr(keys.Path, "read_bytes", deny)
    with pytest.raises(ValueError, match="/keys/view") as refused:
        keys.key_from(VIEW)
    assert_clear(str(refused.value), FILE, "Permission denied", "name a file")


def test_blanks_around_a_key_are_no_part_of_it(monkeypatch):
    monkeypatch.setenv(VIEW, " key ")
    assert keys.key_from(VIEW) == "key"


@pytest.mark.parametrize(
    ("free", "knobs", "what", "do"),
    [
        (3, {}, "3.0 GB of memory", "set host_memory_gb"),
        (3, {"host_memory_gb": 4}, "host_memory_gb=4", "lower host_memory_gb"),
        (3, {"host_memory_gb": 1e-6}, "holds no page", "raise host_memory_gb"),
        (0, {"host_memory_gb": 1}, "host_memory_gb=1", "free memory on the host"),
    ],
)
def test_memory_that_is_not_there(free, knobs, what, do, monkeypatch):
    monkeypatch.setattr(config, "available_memory", lambda: free * GB)
    with pytest.raises(ValueError, match=r"^retrieval: ") as refused:
        resolve(RetrievalConfig(**knobs), bytes_per_token=1000, kv_heads=4, block_size=16, ranks=1)
    assert_clear(str(refused.value), what, do)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_a_ray_that_does_not_answer(host):
    with socket.socket() as held:  # it does not listen, and nobody else can there
        held.bind(("127.0.0.1", 0))
        address = f"{host}:{held.getsockname()[1]}"
        with pytest.raises(ValueError, match=address) as refused:
            check_ray(address)
    assert_clear(str(refused.value), "ray_address", "ray start --head")


def test_what_ray_says_in_many_lines_is_told_in_one(monkeypatch):
    import ray

    def fail(**how):
        raise ConnectionError("could not\nconnect\n")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RuntimeError, match=r"^retrieval: ") as refused:
        supervisor.start_ray("127.0.0.1:1")
    assert_clear(str(refused.value), "ray_address='127.0.0.1:1'", "could not connect")


def test_no_folder_to_write_to(monkeypatch, tmp_path):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(caches, "_writable", lambda folder: False)
    with pytest.raises(OSError, match=r"^retrieval: ") as refused:
        caches.cache_folder()
    assert_clear(str(refused.value), "a temporary one", "mount a writable /tmp")
    found = {check.name: check for check in checks.checks()}["temporary folder"]
    assert (found.verdict, "mount a writable /tmp" in found.do) == (checks.Verdict.STOP, True)


@pytest.mark.parametrize("asked", ["relative", "/proc/nowhere"])
def test_a_cache_folder_that_is_none_is_named_by_the_doctor(asked, monkeypatch):
    monkeypatch.setenv("VLLM_RETRIEVAL_CACHE", asked)
    found = checks.home()
    assert (found.verdict, asked in found.found) == (checks.Verdict.WARN, True)
    assert "set VLLM_RETRIEVAL_CACHE" in found.do


@pytest.mark.parametrize(
    ("error", "ours"),
    [(ValueError("retrieval: a line"), True), (ValueError("theirs"), False), (RuntimeError("retrieval: x"), False)],
)
def test_what_we_refuse_ends_a_program_with_our_line_alone(error, ours, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *what: told.append(what))
    compat._patch_excepthook()
    compat._patch_excepthook()
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == ("retrieval: a line\n" if ours else "")
    assert len(told) == (not ours)
