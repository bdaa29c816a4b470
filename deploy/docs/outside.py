# SPDX-License-Identifier: Apache-2.0
"""Pages and files of the site that lie outside docs/: read where they are, so that each is written once.

A link from a page to a file of the repository that is no page becomes a link to a copy of it under ``files/``.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "deploy/helm/vllm-retrieval/README.md": "kubernetes.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#]+)(#[^)]*)?\)")


def _where(page: str) -> str:
    """The place in the repository that a page's links are relative to."""
    source = next((path for path, name in PAGES.items() if name == page), f"docs/{page}")
    return posixpath.dirname(source)


def _site_link(page: str, link: str) -> str:
    """``link`` of a page, as the site has it."""
    target = posixpath.normpath(posixpath.join(_where(page), link))
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target}" if (ROOT / target).is_file() else link


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and all files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    wanted = set()
    for file in files.documentation_pages():
        for link, _ in LINK.findall(file.content_string):
            site = _site_link(file.src_uri, link)
            if site.startswith("files/"):
                wanted.add(site)
    for site in sorted(wanted):
        # Markdown would become a page, and yaml is shown by browsers only as text.
        content = (ROOT / site.removeprefix("files/")).read_bytes()
        files.append(File.generated(config, site, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them."""
    return LINK.sub(lambda found: f"]({_site_link(page.file.src_uri, found[1])}{found[2] or ''})", markdown)
