"""The light runtime of a bundle, computed from what the commands import."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distill.commit import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = ("distill", "export", "deploy")
# Import name -> distribution, and the oldest release that works (as pyproject.toml says).
PACKAGES = {
    "numpy": ("numpy", "1.26"),
    "psutil": ("psutil", "5.9"),
    "tokenizers": ("tokenizers", "0.20"),
    "jinja2": ("Jinja2", "3.1"),
    "starlette": ("starlette", "0.40"),
    "uvicorn": ("uvicorn", "0.30"),
    "onnxruntime": ("onnxruntime", "1.22"),
    "cuda": ("cuda-python", "12.6"),
}
FROM_THE_SYSTEM = frozenset({"tensorrt", "tensorrt_rtx"})  # JetPack's, or NVIDIA's own packages
IN_PLACE_ONNXRUNTIME, IN_PLACE_PYTHON = "1.32", "3.11"
"""Of a CPU engine that appends to its cache in place: oldest ONNX Runtime, and Python of that."""
ENGINE_PACKAGES = {"onnxruntime": frozenset({"onnxruntime"}), "tensorrt": frozenset({"cuda"})}


@dataclass(frozen=True)
class Runtime:
    """`modules`: our files by path relative to the project. `packages`: import names of others."""

    modules: tuple[Path, ...]
    packages: frozenset[str]


@dataclass(frozen=True)
class Import:
    """A dotted name; `is_lazy`: inside a function, so that it happens when that is called."""

    name: str
    is_lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def runtime_of(entries: Iterable[str], root: Path = ROOT) -> Runtime:
    """Everything that the modules `entries` import, directly or not, inside functions too.

    An optional feature stays out: a package that is not a light one, or a module that cannot be
    imported without such a package, where only a function imports it.
    Raises: UserError when an entry cannot be imported without a package that is not light.
    """
    waiting, found, packages = list(entries), dict[str, Path](), set[str]()
    for name in waiting:
        _require_light(name, root)
    while waiting:
        name = waiting.pop()
        path = _file_of(name, root)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += _parents(name)
        for imported in _imports(path, root):
            if imported.top in OURS:
                if not imported.is_lazy or not _heavy(imported.name, root):
                    waiting.append(imported.name)
            elif imported.top in PACKAGES:
                packages.add(imported.top)
    modules = sorted(path.relative_to(root) for path in found.values())
    return Runtime(tuple(modules), frozenset(packages))


def requirements(
    packages: Iterable[str], engine: str, on_gpu: bool, oldest: str | None = None
) -> list[str]:
    """Lines of requirements.txt: pinned to what is installed here, a range for older Pythons.

    Args:
        packages: import names, as `runtime_of` found them.
        engine: "onnxruntime" or "tensorrt"; packages of the other one are left out.
        on_gpu: take the GPU build of ONNX Runtime.
        oldest: oldest ONNX Runtime that runs the engine; None: the oldest that we support.
    """
    others = frozenset().union(*(p for name, p in ENGINE_PACKAGES.items() if name != engine))
    lines = []
    for package in sorted(set(packages) - others):
        name, since = PACKAGES[package]
        if package == "onnxruntime":
            name, since = "onnxruntime-gpu" if on_gpu else name, oldest or since
        lines += _pinned(name, since)
    return lines


def _pinned(name: str, oldest: str) -> list[str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return [f"{name}>={oldest}"]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return [
        f'{name}=={version} ; python_version >= "{python}"',
        f'{name}>={oldest} ; python_version < "{python}"',
    ]


def _require_light(entry: str, root: Path) -> None:
    heavy = _heavy(entry, root)
    if heavy:
        raise UserError(
            f"{entry} needs {', '.join(sorted(heavy))} to be imported; a bundle carries "
            f"{', '.join(PACKAGES)} only; report this"
        )


def _heavy(entry: str, root: Path) -> set[str]:
    """Packages, other than light ones, without which a module cannot be imported."""
    waiting, seen, heavy = [entry], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        path = _file_of(name, root)
        if path is None or name in seen:
            continue
        seen.add(name)
        waiting += _parents(name)
        for imported in _imports(path, root):
            if imported.is_lazy:
                continue
            if imported.top in OURS:
                waiting.append(imported.name)
            elif imported.top not in sys.stdlib_module_names and not _is_light(imported.top):
                heavy.add(imported.top)
    return heavy


def _is_light(package: str) -> bool:
    return package in PACKAGES or package in FROM_THE_SYSTEM


@cache
def _imports(path: Path, root: Path) -> tuple[Import, ...]:
    """Every import in a file, absolute; of a name that may be a module, that and its parent."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return tuple(_below(tree, path.relative_to(root).parts[:-1], False))


def _below(node: ast.AST, folder: tuple[str, ...], is_lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _names(child, folder):
            yield Import(name, is_lazy)
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _below(child, folder, is_lazy or is_function)


def _names(node: ast.AST, folder: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = folder[: len(folder) - node.level + 1] if node.level else ()
        stem = ".".join((*base, *([node.module] if node.module else [])))
        return [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
    return []


def _file_of(name: str, root: Path) -> Path | None:
    """The file of a module of ours; None for a name inside a module."""
    if name.partition(".")[0] not in OURS:
        return None
    stem = root.joinpath(*name.split("."))
    files = (stem / "__init__.py", stem.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
