# SPDX-License-Identifier: Apache-2.0
"""The documentation: it builds, its links lead somewhere, and its tables say what the code says."""

import re
import subprocess
import sys

import pytest
import yaml

from tests.unit.documents import PAGES, ROOT, name
from vllm_retrieval_attn.core.config import RetrievalConfig
from vllm_retrieval_attn.doctor.sizing import ModelShape, needs

LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]*))?\)")


def anchors(path):
    titles = re.findall(r"(?m)^#+ (.*)", path.read_text())
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\([^)]*\)", "", title).lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_site_builds_strictly_and_has_every_page(tmp_path):
    config = ROOT / "deploy/docs/mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(config), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    named = re.findall(r": ([\w-]+)\.md$", config.read_text(), re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= set(named)
    for page in named:
        text = (tmp_path / f"{page}.html").read_text()
        assert "<h1" in text
        # Nothing is fetched from elsewhere.
        assert not re.search(r"""<(?:link|script|img)[^>]*(?:href|src)=["']?(?:https?:)?//""", text)


def test_the_table_of_sizes_is_what_doctor_computes():
    shape, number = r"\((\d+)(?: layers)?, (\d+)(?: KV heads)? of (\d+)\)", r" \| ([\d.]+)"
    rows = re.findall(rf"\| \S+ {shape} \| ([\d,]+){number * 4} \|", (ROOT / "docs/sizing.md").read_text())
    assert len(rows) == 12
    for layers, heads, size, context, *said in rows:
        shape = ModelShape(int(layers), int(heads), int(size), 2)
        need = needs(shape, int(context.replace(",", "")), 1, 1, 16, 8192, RetrievalConfig())
        assert said == [f"{need[part]:.1f}" for part in ("full_gb", "paged_gb", "codes_gb", "host_gb")]


def test_the_tests_that_the_matrix_names_exist():
    named = set(re.findall(r"`(tests/[^`]*)`", (ROOT / "docs/support.md").read_text()))
    assert len(named) > 12
    assert [path for path in named if not any(ROOT.glob(path))] == []


def test_every_knob_is_documented_with_its_default():
    page = (ROOT / "docs/knobs.md").read_text()
    for knob, field in RetrievalConfig.model_fields.items():
        (said,) = re.findall(rf"(?m)^\| `{knob}` \| ([^|]*) \|", page)
        if field.default is not None:  # None: computed, or there is none; the table says how
            default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            default = (
                f"{field.default:.5f}".rstrip("0")
                if isinstance(field.default, float) and field.default < 1
                else default
            )
            assert said.strip("` ").removesuffix(".0") == default.removesuffix(".0"), knob


def test_every_alert_is_in_the_table_of_symptoms():
    rules = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    page = (ROOT / "docs/operate.md").read_text()
    assert [alert for alert in alerts if f"| `{alert}` |" not in page] == []
