# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile and shell scripts, as their linters see them; `make image` builds and runs the image."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ["deploy/image.sh", "tests/gpu/batch.sh", ".ci/run"]


def tool(name):
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} comes with the extra dev"
    return found


def test_the_dockerfile_is_clean():
    done = subprocess.run([tool("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_are_clean():
    done = subprocess.run([tool("shellcheck"), *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_images_have_users_checks_and_labels():
    parts = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    images = {part.split()[2]: part for part in parts[1:]}
    for name in ("cpu", "cuda"):
        assert re.findall(r"^USER (\d+)$", images[name], re.MULTILINE)[-1] == "2000"
        for word in ("HEALTHCHECK", "/retrieval/ready", "image.licenses", "bench.search", "EXPOSE 8000"):
            assert word in images[name]


def test_the_build_needs_what_the_context_has():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert f"!{source}" in ignored
        assert (ROOT / source).exists()
