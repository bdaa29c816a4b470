# SPDX-License-Identifier: Apache-2.0
"""Reads a copy of vLLM, installed or in a wheel, without importing it: which symbols it has, and their signatures."""

import ast
import zipfile
from functools import cache
from pathlib import Path


class Source:
    """The Python files of a vLLM. ``place``: its wheel, or the folder ``vllm`` of an installation."""

    def __init__(self, place: Path) -> None:
        self._wheel = zipfile.ZipFile(place) if place.is_file() else None
        self._folder = place
        self._names = set(self._wheel.namelist()) if self._wheel else set()
        self.module = cache(self._module)

    def _text(self, name: str) -> str | None:
        if self._wheel:
            return self._wheel.read(name).decode() if name in self._names else None
        path = self._folder.parent / name
        return path.read_text() if path.is_file() else None

    def _module(self, module: str) -> ast.Module | None:
        stem = module.replace(".", "/")
        text = self._text(f"{stem}.py")
        if text is None:
            text = self._text(f"{stem}/__init__.py")
        return None if text is None else ast.parse(text)

    def find(
        self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[str, ast.AST] | None:
        """The definition of ``name`` as seen from ``module``, through re-exports: its module and node."""
        tree = self.module(module)
        if tree is None or (module, name) in seen:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        found = self.find(_absolute(module, node, self), name, seen | {(module, name)})
                        if found is not None:
                            return found
                    if (alias.asname or alias.name) != name:
                        continue
                    origin = _absolute(module, node, self)
                    found = self.find(origin, alias.name, seen | {(module, name)})
                    if found is None and self.module(f"{origin}.{alias.name}") is not None:
                        return f"{origin}.{alias.name}", ast.Module(body=[], type_ignores=[])
                    return found or (module, node)  # from a package that is not vLLM's, or compiled
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, node
        if self.module(f"{module}.{name}") is not None:
            return f"{module}.{name}", ast.Module(body=[], type_ignores=[])
        # Lazy exports: vllm/__init__.py and others list them as strings.
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                        origin, _, attribute = str(value.value).rpartition(":")
                        origin = origin or str(value.value)
                        origin = f"{module}{origin}" if origin.startswith(".") else origin
                        return self.find(origin, attribute or name, seen | {(module, name)})
        return None

    def member(self, module: str, owner: str, name: str) -> ast.AST | None:
        """Method or field ``name`` of class ``owner`` or of a base of it that is vLLM's own."""
        found = self.find(module, owner)
        if found is None:
            return None
        where, node = found
        if isinstance(node, ast.Module):
            found = self.find(where, name)
            return found and found[1]
        if not isinstance(node, ast.ClassDef):
            return None
        for child in _statements(node.body):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == name:
                return child
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and child.target.id == name:
                return child
            if isinstance(child, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in child.targets):
                return child
        for child in ast.walk(node):  # self.name = ..., in its own methods
            targets = (
                child.targets
                if isinstance(child, ast.Assign)
                else [child.target]
                if isinstance(child, ast.AnnAssign)
                else []
            )
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr == name and _is_self(target.value):
                    return ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=None))
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and (hit := self.member(where, base.id, name)) is not None:
                return hit
        return None

    def abstract(self, module: str, owner: str) -> list[str]:
        """The abstract methods that class ``owner`` itself declares."""
        found = self.find(module, owner)
        node = found[1] if found else None
        body = _statements(node.body) if isinstance(node, ast.ClassDef) else []
        methods = [child for child in body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
        return sorted(m.name for m in methods if any(_last_name(mark) == "abstractmethod" for mark in m.decorator_list))


def signature(node: ast.AST) -> str:
    """What callers and overrides rely on: kind, parameters with their kinds and whether they have defaults."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = [_last_name(mark) for mark in node.decorator_list]
        kind = next((mark for mark in marks if mark in ("classmethod", "staticmethod", "property")), "function")
        word = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        return f"{word}{kind}({', '.join(_parameters(node.args))})"
    return {ast.ClassDef: "class", ast.Module: "module"}.get(type(node), "value")


def _parameters(arguments: ast.arguments) -> list[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    first = len(plain) - len(arguments.defaults)
    out = [argument.arg + ("=" if i >= first else "") for i, argument in enumerate(plain)]
    if arguments.vararg:
        out.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        out.append("*")
    out += [
        a.arg + ("=" if d is not None else "") for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [*out, f"**{arguments.kwarg.arg}"] if arguments.kwarg else out


def _last_name(node: ast.AST) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """``body`` with what stands under if, try and with."""
    out: list[ast.stmt] = []
    for node in body:
        out.append(node)
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                out += _statements(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                out += _statements(handler.body)
    return out


def _absolute(module: str, node: ast.ImportFrom, source: Source) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = source._text(f"{module.replace('.', '/')}/__init__.py") is not None
    keep = len(parts) - node.level + (1 if package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])
