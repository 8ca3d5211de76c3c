"""TensorRT engines from a lowered student, or the kit with which a device builds its own.

With `tensorrt` and a GPU the engine is built for that GPU. Without, TensorRT-RTX builds one engine
for several GPU generations ahead of time; those that only the device itself can build get a kit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.artifact import (
    MANIFEST,
    UserError,
    open_artifact,
    require_disk,
    require_memory,
    sha256_file,
    staged,
    write_manifest,
)
from distill.console import progress
from export.trt_api import PRODUCT, BuildError, Flavour, load_tensorrt
from export.trt_builder import (
    FIRST_RELEASE,
    BuildSettings,
    allows_tf32,
    engine_from_onnx,
    first_release,
)
from export.trt_kit import write_build_kit
from export.trt_onnx import (
    MODEL,
    Limits,
    Logits,
    Prepared,
    Shapes,
    context_limits,
    prepare_onnx,
    profiles_of,
)
from export.trt_place import Place, choose_place
from export.trt_record import write_engine
from export.trt_targets import PARSER

# Host memory of a build: measured on SmolLM2-135M with TensorRT-RTX 1.7 (docs/measured/trt.json).
HOST_BASE_BYTES = 900 * 2**20
HOST_BYTES_PER_WEIGHT_BYTE = 4.5
NOT_COPIED = (MANIFEST, "genai_config.json")
PERCENT = 100
FLAVOURS = ("standard", "plain")


@dataclass(frozen=True)
class Source:
    """A lowered student: its directory and manifest, its graph and the profiles for it."""

    directory: Path
    manifest: Mapping[str, Any]
    prepared: Prepared
    profiles: Mapping[str, Shapes]
    made_from: Mapping[str, Any]

    @property
    def precision(self) -> str:
        return str(self.made_from["precision"])

    @property
    def weight_bytes(self) -> int:
        return sum(file["bytes"] for file in self.made_from["onnx"]["files"].values())


@dataclass(frozen=True)
class EngineReport:
    """What was written. `record` is build.json; None where there is only a kit."""

    place: Place
    engine_bytes: int
    seconds: float
    record: Mapping[str, Any] | None


def build_engine(
    onnx_directory: Path,
    directory: Path,
    *,
    targets: Sequence[str] | None,
    max_batch: int,
    max_seq: int,
    max_past: int,
    workspace_bytes: int,
    argv: Sequence[str],
    logits: Logits = "input",
    flavour: Flavour | None = None,
    device_onnx: Path | None = None,
) -> EngineReport:
    """Write an "engine-trt" artefact: model.engine with build.json, or a build kit, or both.

    The directory holds the engine and the tokenizer files. Where all targets need their device, it
    is itself the kit; where only some do, their kit is the directory `device` in it.

    Args:
        onnx_directory: "onnx" artefact of the standard or plain flavour.
        targets: compute capabilities such as "sm86"; None: the GPU here, or without one all that
            can be built ahead of time.
        max_batch, max_seq, max_past: limits of the two profiles (sequences, tokens), cut to the
            model's context.
        workspace_bytes: most device memory that a tactic may use.
        logits: "input": each call says how many last positions get logits (`logits_to_keep`, a
            shape tensor); "last" or "all": built in.
        flavour: None: `tensorrt` for the GPU here where it is installed, else `tensorrt_rtx`.
        device_onnx: what the kit is made of; None: `onnx_directory`.

    Raises: UserError for wrong targets, absent TensorRT, too little memory or disk, a damaged or
        unsuitable ONNX, or a build that fails.
    """
    directory = Path(directory)
    try:
        limits = Limits(max_batch, max_seq, max_past)
        source = _open_source(Path(onnx_directory), logits, limits)
        of_kit = source if device_onnx is None else _open_source(device_onnx, logits, limits)
        place = choose_place(targets, source.precision, source.prepared.activations, flavour)
        _require_parsed(of_kit, place.kit)
        _check_room(directory, place, source.weight_bytes)
        with staged(directory) as staging:
            _copy_companions(source, staging)
            if place.kit:
                _write_kit(
                    of_kit, staging / "device" if place.here else staging, place, workspace_bytes
                )
            settings = BuildSettings(
                flavour=place.flavour,
                profiles=source.profiles,
                targets=place.here if place.flavour == "tensorrt_rtx" else (),
                workspace_bytes=workspace_bytes,
                tf32=allows_tf32(source.precision),
                timing_cache=directory.absolute().parent / "timing.cache",
            )
            record = _build(source, staging, settings, place.here) if place.here else None
            report = _report(place, record)
            write_manifest(
                staging,
                kind="engine-trt",
                parent=source.made_from["onnx"]["manifest_sha256"],
                argv=list(argv),
                seed=int(source.manifest["seed"]),
                measured={**_measured(report, source), "workspace_bytes": workspace_bytes},
            )
    except BuildError as error:
        raise UserError(str(error)) from None
    return report


def trt_settings(
    place: Place, onnx_directory: Path, wanted: Limits, workspace_bytes: int
) -> dict[str, Any]:
    """Figures of the manifest that another engine must share to be as good as a new one."""
    return {
        "flavour": place.flavour if place.here else None,
        "version": load_tensorrt(place.flavour).__version__ if place.here else None,
        "targets": list(place.here),
        "kit_targets": list(place.kit),
        "limits": asdict(context_limits(onnx_directory, wanted)),
        "workspace_bytes": workspace_bytes,
    }


def host_bytes_needed(weight_bytes: int) -> int:
    """Estimated peak of resident memory of a build, from the bytes of the ONNX files."""
    return round(HOST_BASE_BYTES + HOST_BYTES_PER_WEIGHT_BYTE * weight_bytes)


def _open_source(directory: Path, logits: Logits, wanted: Limits) -> Source:
    manifest = open_artifact(directory, "onnx")
    flavour = manifest["measured"].get("flavour")
    if flavour not in FLAVOURS:
        raise UserError(
            f"{directory} has the {flavour!r} flavour; TensorRT needs standard operators; write "
            "that flavour with: python -m export --run RUN --engine trt"
        )
    prepared, limits = prepare_onnx(directory, logits), context_limits(directory, wanted)
    files = {
        name: {
            "bytes": manifest["files"][name]["size_bytes"],
            "sha256": manifest["files"][name]["sha256"],
        }
        for name in (MODEL, *prepared.data_files)
    }
    onnx = {"manifest_sha256": sha256_file(directory / MANIFEST), "files": files}
    made_from = {
        "precision": str(manifest["measured"]["precision"]),
        "logits": logits,
        "limits": asdict(limits),
        "onnx": onnx,
    }
    return Source(directory, manifest, prepared, profiles_of(prepared.inputs, limits), made_from)


def _require_parsed(source: Source, targets: Sequence[str]) -> None:
    """Raise UserError for a device whose TensorRT cannot parse the graph of its kit."""
    first = first_release(source.prepared.operators)
    for target in targets:
        if target in PARSER and PARSER[target] < first:
            found = ", ".join(sorted(source.prepared.operators & FIRST_RELEASE.keys()))
            raise UserError(
                f"{source.directory} has {found}, which TensorRT parses from {first[0]}.{first[1]} "
                f"on; the kit for {target} needs plain operators; write both with: "
                f"python -m export --run RUN --engine trt --target {target}"
            )


def _check_room(directory: Path, place: Place, weight_bytes: int) -> None:
    copies = (1 if place.kit else 0) + (2 if place.here else 0)
    require_disk(directory, copies * weight_bytes, "the TensorRT export")
    if place.here:
        need_bytes = host_bytes_needed(weight_bytes)
        require_memory(need_bytes, f"the {PRODUCT[place.flavour]} build")


def _copy_companions(source: Source, destination: Path) -> None:
    """Tokenizer, chat template, configuration, plan: every file that is not the graph."""
    left_out = {*NOT_COPIED, MODEL, *source.prepared.data_files}
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and path.name not in left_out:
            shutil.copyfile(path, destination / path.name)


def _write_kit(source: Source, directory: Path, place: Place, workspace_bytes: int) -> None:
    directory.mkdir(exist_ok=True)
    _copy_companions(source, directory)
    write_build_kit(
        source.directory,
        directory,
        prepared=source.prepared,
        targets=place.kit,
        profiles=source.profiles,
        workspace_bytes=workspace_bytes,
        made_from=source.made_from,
    )


def _build(
    source: Source, staging: Path, settings: BuildSettings, targets: Sequence[str]
) -> dict[str, Any]:
    trt = load_tensorrt(settings.flavour)
    title = f"{PRODUCT[settings.flavour]} engine for {' '.join(targets)}"
    with progress(PERCENT, title, unit="per cent") as shown:

        def on_progress(share: float, phase: str) -> None:
            shown.update(int(share * PERCENT) - shown.done, phase=phase)

        onnx_path = source.directory / MODEL
        built = engine_from_onnx(trt, source.prepared.onnx_bytes, onnx_path, settings, on_progress)
    return write_engine(staging, built, settings, {"targets": list(targets), **source.made_from})


def _report(place: Place, record: dict[str, Any] | None) -> EngineReport:
    if record is None:
        return EngineReport(place, 0, 0.0, None)
    return EngineReport(place, record["engine"]["bytes"], record["build_seconds"], record)


def _measured(report: EngineReport, source: Source) -> dict[str, Any]:
    """Figures of the manifest; the ONNX's own, its parity proof included, come along."""
    record = report.record or {}
    return {
        "flavour": record.get("flavour"),
        "version": record.get("version"),
        "targets": list(report.place.here),
        "kit_targets": list(report.place.kit),
        "precision": source.precision,
        "logits": source.made_from["logits"],
        "limits": source.made_from["limits"],
        "engine_bytes": report.engine_bytes,
        "layers": len(record.get("layers", ())),
        "seconds": report.seconds,
        "peak_host_bytes": record.get("peak_host_bytes"),
        "onnx": dict(source.manifest["measured"]),
    }
