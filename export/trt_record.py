"""build.json: what an engine was built from, by what and for which GPUs; and writing both files.

Standard library only: a build kit carries this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.trt_api import BuildError
from export.trt_builder import BuildSettings, Built

ENGINE = "model.engine"
RECORD = "build.json"
RECORD_SCHEMA = 1


def write_engine(
    directory: Path, built: Built, settings: BuildSettings, made_from: Mapping[str, Any]
) -> dict[str, Any]:
    """Write model.engine, then build.json, each whole or not at all; returns the record.

    Args:
        made_from: precision, logits, limits and the hashes of the ONNX files.
    """
    engine = memoryview(built.engine)
    (directory / RECORD).unlink(missing_ok=True)
    _write_whole(directory / ENGINE, engine)
    record = {
        "schema": RECORD_SCHEMA,
        "flavour": settings.flavour,
        "version": built.version,
        "targets": list(settings.targets),
        **made_from,
        "profiles": settings.profiles,
        "workspace_bytes": settings.workspace_bytes,
        "tf32": settings.tf32,
        "engine": {"bytes": engine.nbytes, "sha256": sha256_of(directory / ENGINE)},
        "build_seconds": round(built.seconds, 2),
        "peak_host_bytes": peak_host_bytes(),
        "inputs": built.inputs,
        "outputs": built.outputs,
        "layers": built.layers,
    }
    _write_whole(directory / RECORD, memoryview(_readable(record).encode()))
    return record


def check_files(directory: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Raise BuildError unless every file has its recorded bytes and sha256."""
    for name, recorded in files.items():
        path = directory / name
        if not path.is_file():
            raise BuildError(f"{path} is missing; needs the file as it was written; {remedy}")
        if path.stat().st_size != recorded["bytes"] or sha256_of(path) != recorded["sha256"]:
            raise BuildError(
                f"{path} is not the file that was written (size or sha256 differ); needs it "
                f"unaltered; {remedy}"
            )


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far; not what its parent had when it began, which
    Linux counts in ru_maxrss."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _readable(record: Mapping[str, Any]) -> str:
    """JSON with one line for each entry of the long lists."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = ",\n    ".join(json.dumps(entry) for entry in value)
            lines.append(f"  {json.dumps(key)}: [\n    {body}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write_whole(path: Path, content: memoryview) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
