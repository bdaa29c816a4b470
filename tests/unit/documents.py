# SPDX-License-Identifier: Apache-2.0
"""The documentation's pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
PAGES = [
    *(ROOT / name for name in OUTSIDE),
    ROOT / "deploy/helm/vllm-retrieval/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
NOT_RUN = "# not run by a test"
"""In a block: why none of it is; after a command: why that one is not."""
BY_HAND = {"docs/benchmarks.md"}
"""A log of what was run by hand on GPU machines."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return _FENCE.findall(page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each shell command of a block that is not marked, without variables before it."""
    for language, text in fences(page):
        if language != "sh" or text.startswith(NOT_RUN):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = [] if NOT_RUN in line else shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words


def mentioned(page: Path, program: str) -> Iterator[list[str]]:
    """The words of commands of ``program`` within sentences."""
    text = _FENCE.sub("", page.read_text())
    for span in _SPAN.findall(text):
        if span.startswith(f"{program} "):
            # Placeholders in brackets are what may be left out.
            yield shlex.split(" ".join(span.split()).replace("[", "").replace("]", ""))
