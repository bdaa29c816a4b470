# SPDX-License-Identifier: Apache-2.0
"""What this package uses of vLLM is there, in the installed version and in those recorded, and looks alike.

Read from sources, without importing them: a version that is not installed has a record (tests/contract/record.py).
"""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from tests.contract.record import record
from tests.contract.uses import PACKAGE, uses
from tests.contract.vllm_source import Source, signature

RECORDS = sorted((Path(__file__).parents[1] / "data").glob("vllm-*.json"))

ALIKE = {
    # Two more parameters with defaults at the end, which we do not pass.
    "vllm.vllm_flash_attn:flash_attn_varlen_func",
}
"""Signatures that differ in a way that was looked at and does not matter to us."""


@pytest.fixture(scope="module")
def used():
    return uses()


@pytest.fixture(scope="module")
def installed(used):
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return record(Source(Path(spec.origin).parent), used)


def recorded(path):
    return json.loads(path.read_text())


def test_there_is_a_record():
    assert [path.stem for path in RECORDS] == ["vllm-0.33.0"]


def test_all_that_is_imported_or_wrapped_is_installed(used, installed):
    assert [name for name, kind in installed["symbols"].items() if kind is None] == []
    assert [member for member in used.members if installed["members"][".".join(member)] is None] == []


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_record_has_all_that_is_used(path, installed):
    for part, found in installed.items():
        assert recorded(path)[part].keys() == found.keys(), "make it again, see tests/contract/record.py"


@pytest.mark.parametrize("part", ["symbols", "members", "abstract"])
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_recorded_version_looks_like_the_installed_one(path, part, installed):
    """Missing things, other parameters, methods that newly override something or must be there."""
    other = recorded(path)[part]
    differ = {name: (kind, other[name]) for name, kind in installed[part].items() if kind != other[name]}
    assert set(differ) <= ALIKE, differ


def test_our_methods_take_what_vllm_passes(used, installed):
    """By position or name: each parameter of the method that is overridden, or ``*args`` and ``**kwargs`` for it."""
    wrong = []
    for ours, (bases, methods) in used.overrides.items():
        file, name = ours.split(":")
        node = next(n for n in ast.walk(ast.parse((PACKAGE / file).read_text())) if getattr(n, "name", None) == name)
        assert isinstance(node, ast.ClassDef)
        for method in methods:
            mine = next(child for child in node.body if getattr(child, "name", None) == method)
            for base in bases:
                theirs = installed["members"][f"{base}.{method}"]
                if theirs and "(" in theirs and method != "__init__" and not takes(signature(mine), theirs):
                    wrong.append(f"{ours}.{method}: {signature(mine)} for {theirs}")
    assert wrong == []


def parameters(text):
    return [part for part in text[text.index("(") + 1 : -1].split(", ") if part]


def takes(mine, theirs):
    if mine.split("(")[0] != theirs.split("(")[0]:
        return False
    mine, theirs = parameters(mine), parameters(theirs)
    names = [part.rstrip("=") for part in mine]
    # Positions of parameters without a star must agree until *args takes the rest.
    for place, part in enumerate(theirs):
        if part == "*" or part.startswith("*"):
            break
        if place < len(names) and names[place].startswith("*"):
            break
        if place >= len(names) or names[place] != part.rstrip("="):
            return False
    swallow = any(part.startswith("**") for part in mine)
    return swallow or all(part.rstrip("=") in names or part.startswith("*") for part in theirs)


def tree(folder, text):
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm/__init__.py").write_text("")
    (folder / "vllm/parts.py").write_text(text)
    return Source(folder / "vllm")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class Base:\n def step(self, a, b=1): ...\nclass Part(Base): ...", "function(self, a, b=)"),
        ("class Base:\n def step(self, a, *, b=1): ...\nclass Part(Base): ...", "function(self, a, *, b=)"),
        ("class Part:\n async def step(self): ...", "async function(self)"),
        ("class Part:\n @property\n def step(self): ...", "property(self)"),
        ("class Part:\n def run(self):\n  self.step = 1", "value"),
        ("class Part: ...", None),
    ],
)
def test_the_reader_sees_what_differs(text, found, tmp_path):
    node = tree(tmp_path, text).member("vllm.parts", "Part", "step")
    assert (node and signature(node)) == found


@pytest.mark.parametrize(
    ("mine", "theirs", "fits"),
    [
        ("function(self, a, b=)", "function(self, a, b=)", True),
        ("function(self, a)", "function(self, a, b=)", False),
        ("function(self, b, a)", "function(self, a, b)", False),
        ("function(self, a, *rest, **named)", "function(self, a, b, *, c=)", True),
        ("function(self, a, **named)", "function(self, a, *, c=)", True),
        ("function(self, a)", "async function(self, a)", False),
    ],
)
def test_what_a_method_takes(mine, theirs, fits):
    assert takes(mine, theirs) == fits
