"""Refuse an engine that does not fit: another GPU, another TensorRT, or files that changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.artifact import MANIFEST, UserError, read_json, sha256_file
from export.trt_api import PRODUCT, BuildError, Flavour
from export.trt_device import KIT
from export.trt_record import ENGINE, RECORD, RECORD_SCHEMA, check_files
from export.trt_targets import AHEAD_OF_TIME, KNOWN


def check_engine(
    directory: Path,
    gpu_sm: str,
    trt_version: str,
    *,
    flavour: Flavour | None = None,
    onnx_directory: Path | None = None,
) -> dict[str, Any]:
    """Verify that this engine runs on this GPU with this TensorRT; returns its build.json.

    Args:
        gpu_sm: compute capability of the GPU, such as "sm89" (`trt_targets.gpu_sm`).
        trt_version: `__version__` of the module that would load the engine. Engines fit no other.
        flavour: the name of that module, where the caller knows it.
        onnx_directory: where given, the engine must come from the ONNX that is there now.

    Raises: UserError that ends with the command which builds a fitting engine.
    """
    directory = Path(directory)
    record = read_record(directory)
    remedy = rebuild_command(directory, record, gpu_sm)
    if flavour is not None and record["flavour"] != flavour:
        raise UserError(
            f"{directory / ENGINE} was built by {PRODUCT[record['flavour']]}; needs that to load "
            f"it, not {PRODUCT[flavour]}; install it or build again with: {remedy}"
        )
    if record["version"] != trt_version:
        raise UserError(
            f"{directory / ENGINE} was built by {PRODUCT[record['flavour']]} {record['version']}, "
            f"here is {trt_version}; engines run only on the release that built them; build again "
            f"with: {remedy}"
        )
    if gpu_sm not in record["targets"]:
        raise UserError(
            f"{directory / ENGINE} is for {','.join(record['targets'])}, the GPU here is {gpu_sm} "
            f"({KNOWN.get(gpu_sm, 'unknown')}); needs an engine for it; build one with: {remedy}"
        )
    try:
        check_files(directory, {ENGINE: record["engine"]}, f"build it again with: {remedy}")
    except BuildError as error:
        raise UserError(str(error)) from None
    if onnx_directory is not None:
        _check_source(directory, record, onnx_directory, remedy)
    return record


def read_record(directory: Path) -> dict[str, Any]:
    """build.json of a built engine. Raises: UserError, for a kit with the command that builds."""
    path = directory / RECORD
    if not path.is_file() and (directory / KIT).is_file():
        raise UserError(
            f"{directory} is a build kit that has no engine yet; needs to be built on its device; "
            f"there run: python3 {directory / 'build.py'}"
        )
    record = read_json(path)
    needed = {"flavour", "version", "targets", "engine", "precision", "onnx", "inputs"}
    known = isinstance(record, dict) and needed <= record.keys()
    if not known or record.get("schema") != RECORD_SCHEMA or record["flavour"] not in PRODUCT:
        raise UserError(
            f"{path} is not a build record of schema {RECORD_SCHEMA}; needs the one written "
            f"beside {ENGINE}; write both again with: python -m export --run RUN --engine trt "
            "--overwrite"
        )
    return record


def rebuild_command(directory: Path, record: dict[str, Any], gpu_sm: str) -> str:
    """The command that makes an engine for `gpu_sm` from the same run."""
    if (directory / KIT).is_file() and gpu_sm in read_json(directory / KIT).get("targets", ()):
        return f"python3 {directory / 'build.py'}"
    parts = directory.absolute().parts
    run = str(Path(*parts[:-2])) if "engine-trt" in parts[-2:-1] else "RUN"
    command = (
        f"python -m export --run {run} --engine trt --precision {record['precision']} "
        f"--target {gpu_sm} --overwrite"
    )
    return command if gpu_sm in AHEAD_OF_TIME else f"{command} (on the device then: build.py)"


def _check_source(directory: Path, record: dict[str, Any], source: Path, remedy: str) -> None:
    found = sha256_file(source / MANIFEST) if (source / MANIFEST).is_file() else "missing"
    if found != record["onnx"]["manifest_sha256"]:
        raise UserError(
            f"{directory / ENGINE} was built from another ONNX than {source} holds now; needs the "
            f"same; build again with: {remedy}"
        )
