# SPDX-License-Identifier: Apache-2.0
"""Wheel and sdist: built, installed into an empty environment, and used from there without the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def run(*command, cwd, **more):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name this repository
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel made from that."""
    out = tmp_path_factory.mktemp("dist")
    # Not isolated: setuptools is here, and a build of its own would want a registry.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    return out


def test_the_wheel_has_what_the_package_reads_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vllm_retrieval_attn").rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".html")
    }
    assert sources <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vllm_retrieval_attn"}
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: vllm<0.34,>=0.32" in metadata


def test_the_sdist_has_licence_and_sources(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "vllm_retrieval_attn/device/decode.cu"} <= names


def test_installed_elsewhere_vllm_finds_the_backend(built, tmp_path):
    """In an environment of its own that has nothing but the wheel; its dependencies are those of this one."""
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), cwd=tmp_path)
    python = str(tmp_path / "env/bin/python")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
        cwd=tmp_path,
    )
    (here,) = {path for path in sys.path if path.endswith("site-packages") and Path(path, "vllm").exists()}
    (there,) = (tmp_path / "env/lib").glob("python*/site-packages")
    # Beside the wheel's, the packages it depends on; the editable install of this repository is not among them.
    for package in Path(here).iterdir():
        if (
            "vllm_retrieval_attn" not in package.name
            and not (there / package.name).exists()
            and package.suffix != ".pth"
        ):
            (there / package.name).symlink_to(package)
    check = (
        "from importlib.metadata import entry_points\\n"
        "import vllm_retrieval_attn\\n"
        "print(vllm_retrieval_attn.__file__)\\n"
        "[one.load()() for one in entry_points(group='vllm.general_plugins', name='retrieval')]\\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\\n"
        "print(AttentionBackendEnum['RETRIEVAL'].get_class().get_name())\\n"
    ).replace("\\n", "\n")
    said = run(python, "-c", check, cwd=tmp_path).split()
    assert said[-2].startswith(str(there))
    assert said[-1] == "RETRIEVAL"
    version = run(str(tmp_path / "env/bin/vllm-retrieval"), "--version", cwd=tmp_path)
    assert version.startswith("vllm-retrieval 0.")


def closure(name, found):
    """The distributions installed here that ``name`` requires, itself among them."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    try:
        requires = [] if name in found else [Requirement(line) for line in distribution(name).requires or []]
    except PackageNotFoundError:  # for another platform
        return found
    found.add(name)
    for requirement in requires:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            closure(requirement.name, found)
    return found


def megabytes(name):
    files = distribution(name).files or []
    return sum(path.stat().st_size for path in map(Path, (file.locate() for file in files)) if path.is_file()) / 1e6


def test_an_install_adds_to_vllms_own_what_the_docs_say(built):
    """Compiled files included; this package as its wheel unpacks, since it is installed in place here."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        ours = sum(file.file_size for file in archive.infolist()) / 1e6
    added = closure("vllm-retrieval-attn", set()) - closure("vllm", set()) - {"vllm-retrieval-attn"}
    total = ours + sum(megabytes(name) for name in added)
    assert {"ray", "faiss-cpu"} <= added
    assert total <= 400
    (said,) = re.findall(r"adds (\d+) MB", (ROOT / "docs/support.md").read_text())
    assert total == pytest.approx(float(said), rel=0.05)
