"""The artefact contract: directories committed by one rename and verified whenever they are opened.

Every stage writes into a directory beside its final name, records the sha256 of each file in
`manifest.json`, and renames the directory last. A killed run therefore leaves nothing that looks
finished, and a stage that opens its parent knows that the parent is whole.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from distill.commit import (
    UserError,
    atomic_write_text,
    read_json,
    recover,
    sha256_file,
    staged,
    write_json,
)
from distill.resources import available_memory_bytes, require_disk, require_memory

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "UserError",
    "atomic_write_text",
    "available_memory_bytes",
    "library_versions",
    "open_artifact",
    "read_json",
    "recover",
    "require_disk",
    "require_memory",
    "sha256_file",
    "staged",
    "write_json",
    "write_manifest",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

WRITTEN_BY = {
    "student": "python -m distill --budget F",
    "student-dense": "python -m distill --budget F --dense-copy",
    "onnx": "python -m export --run RUN --engine ort",
    "engine-ort": "python -m export --run RUN --engine ort",
    "engine-trt": "python -m export --run RUN --engine trt",
    "report": "python -m evaluate",
}
FOLDERS_ABOVE = {"student": 0, "student-dense": 0, "onnx": 1, "engine-ort": 1, "engine-trt": 1}
"""How many folders lie between an artefact of this kind and its run."""
RECORDED_LIBRARIES = (
    "budgeted-lora torch transformers tokenizers accelerate peft datasets safetensors gguf numpy "
    "onnx onnx_ir onnxscript onnxruntime onnxruntime-gpu onnxruntime-genai tensorrt "
    "tensorrt-rtx-cu12 polygraphy"
).split()


def write_manifest(
    directory: Path,
    *,
    kind: str,
    parent: str | None,
    argv: list[str],
    seed: int,
    measured: dict[str, Any],
) -> str:
    """Record every file below `directory` in its manifest.json and seal it.

    Args:
        kind: what the directory is, e.g. "student"; `open_artifact` compares it.
        parent: the hash that `write_manifest` returned for the artefact this one was made from.
        argv: the command line that made it.
        measured: this stage's figures, JSON-serialisable, finite numbers only.

    Returns: sha256 of the manifest, which a child stores as its `parent`.
    Raises: ValueError when `measured` holds NaN or an infinity.
    """
    directory = Path(directory)
    manifest = {
        "kind": kind,
        "schema": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parent": parent,
        "argv": list(argv),
        "seed": seed,
        "python": platform.python_version(),
        "libraries": library_versions(),
        "measured": measured,
        "files": {
            name: {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in _files_below(directory)
        },
    }
    write_json(directory / MANIFEST, manifest)
    return sha256_file(directory / MANIFEST)


def open_artifact(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """Verify a finished artefact and return its manifest.

    Checks that the directory and manifest exist, that the schema is known, that the kind is the
    one asked for, and that every recorded file has its recorded size and sha256. Files that the
    manifest does not mention are allowed.

    Raises: UserError naming the offending file and the command that writes it.
    """
    directory = Path(directory)
    command = WRITTEN_BY.get(kind or directory.name, "the command that made it")
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist; needs a finished {kind or 'artefact'} directory; "
            f"write it with: {command}"
        )
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"{directory / MANIFEST} is missing, so {directory} was not finished or is not ours; "
            f"needs a finished {kind or 'artefact'} directory; write it with: {command}"
        )
    manifest = read_json(directory / MANIFEST)
    _check_manifest(directory, manifest, kind, command)
    for name, recorded in manifest["files"].items():
        _check_file(directory, name, recorded, _remedy(directory, manifest))
    return manifest


def _remedy(directory: Path, manifest: Mapping[str, Any]) -> str:
    """How to get a damaged artefact back: the command that made it, for the same run."""
    kind, argv = manifest["kind"], [str(word) for word in manifest.get("argv") or []]
    command = WRITTEN_BY.get(kind, "the command that made it")
    ours = argv[:2] == ["python", "-m"] and all(map(str.isprintable, argv))
    if ours and "--resume" not in argv:
        if kind in FOLDERS_ABOVE and "--run" not in argv:
            argv += ["--run", str(directory.absolute().parents[FOLDERS_ABOVE[kind]])]
        if kind != "report" and "--overwrite" not in argv:
            argv.append("--overwrite")
        command = shlex.join(argv)
    return f"copy it again, or write it again with: {command}"


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape an artefact, by distribution name."""
    versions = {}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _check_manifest(directory: Path, manifest: Any, kind: str | None, command: str) -> None:
    path = directory / MANIFEST
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path} lists no files; needs a manifest; write it again with: {command}")
    schema, found = manifest.get("schema"), manifest.get("kind")
    if schema != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {schema!r}; this version reads {SCHEMA_VERSION}; upgrade "
            f"budgeted-lora or write the directory again with: {command}"
        )
    if not isinstance(found, str) or (kind is not None and found != kind):
        raise UserError(
            f"{directory} holds a {found!r}; needs a {kind or 'named kind'!r}; point to one or "
            f"write it with: {command}"
        )


def _check_file(directory: Path, name: str, recorded: Any, remedy: str) -> None:
    path = directory / name
    remedy = f"needs the file as it was written; {remedy}"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{directory / MANIFEST} names {name!r} outside its directory; {remedy}")
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    expected = recorded if isinstance(recorded, dict) else {}
    size_bytes = path.stat().st_size
    if size_bytes != expected.get("size_bytes"):
        raise UserError(
            f"{path} has {size_bytes} bytes, not the {expected.get('size_bytes')} of its "
            f"manifest; {remedy}"
        )
    if sha256_file(path) != expected.get("sha256"):
        raise UserError(f"{path} differs from the sha256 in its manifest; {remedy}")


def _files_below(directory: Path) -> list[tuple[str, Path]]:
    """(POSIX name relative to `directory`, path) of every file but the manifest, sorted."""
    files = []
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            if path != directory / MANIFEST:
                files.append((path.relative_to(directory).as_posix(), path))
    return sorted(files)
