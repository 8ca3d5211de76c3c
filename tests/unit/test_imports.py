"""Imports point one way: distill <- export <- deploy <- evaluate."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("distill", "export", "deploy", "evaluate")


def python_files(root: Path, package: str) -> list[Path]:
    """Every Python file of a package; none when it does not exist yet."""
    return sorted((root / package).rglob("*.py"))


def imported_names(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, at any depth of the code."""
    folder = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            parts = (*base, *([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, ".".join((*parts, alias.name))
        elif isinstance(node, ast.Call):
            name = dynamic_import(node)
            if name is not None:
                yield node.lineno, name


def dynamic_import(call: ast.Call) -> str | None:
    """The module that `import_module("name")` or `__import__("name")` asks for."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else None
    called = call.func.id if isinstance(call.func, ast.Name) else called
    if called not in ("import_module", "__import__") or not call.args:
        return None
    argument = call.args[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    return None


def violations(root: Path) -> list[str]:
    """Each import that points to the right of its package, or at another's private name."""
    found = []
    for position, package in enumerate(ORDER):
        forbidden = ORDER[position + 1 :]
        for path in python_files(root, package):
            for line, name in imported_names(path, root):
                parts = name.split(".")
                where = f"{path.relative_to(root)}:{line}"
                if parts[0] in forbidden:
                    found.append(f"{where} imports {name}: {package} may not import {parts[0]}")
                elif parts[0] in ORDER and parts[0] != package and any(map(is_private, parts)):
                    found.append(f"{where} imports {name}, private to {parts[0]}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_packages_import_only_from_their_left() -> None:
    assert python_files(ROOT, "distill"), "the walk found no files to check"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("distill", "import export"),
        ("distill", "import evaluate.probes as probes"),
        ("distill", "from export.lower import lower"),
        ("distill", "def f():\n    from deploy import runner"),
        ("export", "if True:\n    import deploy.runner"),
        ("deploy", "import importlib\nimportlib.import_module('evaluate.report')"),
        ("deploy", "__import__('evaluate')"),
        ("distill", "from .. import evaluate"),
        ("export", "from distill.student import _private"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, package: str, source: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "bad.py").write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("distill", "import torch\nfrom . import artifact\nfrom distill.artifact import _own"),
        ("export", "from distill.artifact import open_artifact"),
        ("evaluate", "import distill, export, deploy\nfrom distill import __version__"),
        ("distill", "from transformers import deploy"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, package: str, source: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "good.py").write_text(source)
    assert violations(tmp_path) == []
