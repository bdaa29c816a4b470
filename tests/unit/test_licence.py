# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence in one of its first lines."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {".py", ".sh", ".cu", ".cuh", ".hpp", ".html"}


def test_each_has_the_line():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    sources = [path for path in files if path.suffix in KINDS or path.name in ("Makefile", "Dockerfile", "run")]
    texts = {path: path.read_text() for path in sources if path.is_file() and path.stat().st_size}
    assert len(texts) > 200
    lines = {path: text.splitlines()[:2] for path, text in texts.items()}
    assert [path for path, first in lines.items() if "SPDX-License-Identifier: Apache-2.0" not in " ".join(first)] == []
