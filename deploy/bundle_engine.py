"""Which engine of a run a device can run, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.devices import Device
from deploy.engines import FLAVOURS, engine_name, engines_matching
from distill.artifact import MANIFEST, UserError, read_json

KIT, RECORD = "kit.json", "build.json"
NOT_CARRIED = ("timing.cache",)


@dataclass(frozen=True)
class Chosen:
    """An engine for a device: its directory, and the sub-directory of its build kit, if any."""

    directory: Path
    kit: Path | None

    @property
    def uses_tensorrt(self) -> bool:
        return self.kit is not None or (self.directory / "model.engine").is_file()


def choose_engine(run: str | None, engine: str | None, device: Device | None) -> Chosen:
    """The first of the engines that are meant which suits the device; for a GPU TensorRT's before
    others, whatever this machine runs.

    Raises: UserError when none suits.
    """
    candidates = engines_matching(run, engine)
    if device is not None:
        candidates.sort(key=lambda candidate: candidate.parent.name != "engine-trt")
    for candidate in candidates:
        suits, kit = _suits(candidate, device)
        if suits:
            return Chosen(candidate, kit)
    names = ", ".join(engine_name(candidate) for candidate in candidates)
    if device is None:
        raise UserError(
            f"--device cpu: {names} does not run on a CPU; needs an ONNX Runtime engine for the "
            "CPU; write one with: python -m export --run RUN --engine ort"
        )
    raise UserError(
        f"--device {device.key}: {names} does not run on its GPU ({device.sm}); needs an engine or "
        f"a build kit for {device.sm}; write one with: python -m export --run RUN --engine trt "
        f"--target {device.sm}"
    )


def _suits(directory: Path, device: Device | None) -> tuple[bool, Path | None]:
    """(whether it runs on the device, the build kit that makes it so)."""
    if (directory / "model.engine").is_file() or (directory / KIT).is_file():
        if device is None:
            return False, None
        if device.sm in _targets(directory / RECORD):
            return True, None
        kits = (directory, directory / "device")
        kit = next((kit for kit in kits if device.sm in _targets(kit / KIT)), None)
        return kit is not None, kit
    words = directory.name.split("-")
    on_gpu = "cuda" in words or "tensorrt" in words
    if device is None:
        return not on_gpu and words[0] not in FLAVOURS[1:], None
    return on_gpu and device.machine == "x86_64", None


def _targets(path: Path) -> list[str]:
    return list(read_json(path).get("targets", [])) if path.is_file() else []


def copy_engine(chosen: Chosen, target: Path, manifest: Mapping[str, Any]) -> None:
    """The engine's files; of an engine with a kit beside it, the kit instead of the engine."""
    target.mkdir()
    nested = chosen.kit is not None and chosen.kit != chosen.directory
    for name in manifest["files"]:
        path = Path(name)
        is_other = nested and (path.parts[0] == "device" or name in ("model.engine", RECORD))
        if not is_other and name not in NOT_CARRIED:
            copy_file(chosen.directory / path, target / path)
    if nested and chosen.kit is not None:
        for source in sorted(p for p in chosen.kit.rglob("*") if p.is_file()):
            copy_file(source, target / source.relative_to(chosen.kit))
    elif not nested:
        copy_file(chosen.directory / MANIFEST, target / MANIFEST)


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
