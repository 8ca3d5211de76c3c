"""``python -m deploy bundle``: one archive for a device, with everything but Python itself."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.bundle_archive import KIND, check_archive, write_archive
from deploy.bundle_engine import Chosen, choose_engine, copy_engine, copy_file
from deploy.bundle_files import DOCKERIGNORE, RUN, Facts, dockerfile, install_script, readme
from deploy.bundle_licence import copy_licences, licence_line, licence_of
from deploy.bundle_runtime import IN_PLACE_ONNXRUNTIME, ROOT, requirements, runtime_of
from deploy.devices import DEVICES, Device, predictions
from deploy.engine_files import engine_precision
from deploy.engines import engine_name
from distill.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    UserError,
    open_artifact,
    require_disk,
    sha256_file,
    write_json,
)

SUMS = "SHA256SUMS"
CPU = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run folder, its name, or an engine directory")
    parser.add_argument("--engine", help="engine of that run (default: what suits the device)")
    parser.add_argument(
        "--device", choices=(CPU, *DEVICES), default=CPU, help="where it will run (default cpu)"
    )
    parser.add_argument(
        "--licence", help="licence of the model (default: as the student's README.md states it)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an archive of that name")
    parser.add_argument("out", type=Path, metavar="OUT.tar.gz", help="the archive to write")


def run(args: argparse.Namespace) -> int:
    """Write the archive and print its identity. Raises: UserError for all that is wrong."""
    out: Path = args.out
    _require_out(out, args.overwrite)
    device = None if args.device == CPU else DEVICES[args.device]
    chosen = choose_engine(args.run, args.engine, device)
    manifest = open_artifact(chosen.directory)
    require_disk(out.parent, 2 * _bytes_of(chosen.directory), "a bundle")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=out.parent) as folder:
        directory = Path(folder)
        fill(directory, chosen, device, manifest, args.licence)
        write_archive(directory, out, out.name.removesuffix(".tar.gz"))
    checked = check_archive(out)
    size_mb = out.stat().st_size / 1e6
    print(f"{out}: {engine_name(chosen.directory)} for {args.device}, {size_mb:.1f} MB")
    print(f"identity {checked.identity}")
    print(f"there: tar xf {out.name} && cd {out.name.removesuffix('.tar.gz')} && ./install.sh")
    return 0


def fill(
    directory: Path,
    chosen: Chosen,
    device: Device | None,
    manifest: Mapping[str, Any],
    licence: str | None,
) -> None:
    """Put everything that a bundle holds into an empty directory."""
    copy_engine(chosen, directory / "engine", manifest)
    kind = "tensorrt" if chosen.uses_tensorrt else "onnxruntime"
    needed = _copy_runtime(directory / "runtime")
    on_gpu = device is not None and kind == "onnxruntime"
    in_place = bool(manifest["measured"].get("cache_in_place"))
    lines = requirements(
        [*needed, *(["cuda"] if kind == "tensorrt" else [])],
        kind,
        on_gpu,
        IN_PLACE_ONNXRUNTIME if in_place else None,
    )
    model_licence = licence_of(chosen.directory, licence)
    facts = Facts(
        model=_model_name(chosen.directory),
        device=device.name if device else "a CPU",
        kind=CPU if device is None else "jetson" if "jetson" in device.name.lower() else "gpu",
        engine=engine_name(chosen.directory),
        is_kit=chosen.kit is not None,
        uses_tensorrt=chosen.uses_tensorrt,
        in_place=in_place,
        licence=licence_line(model_licence),
        requirements=lines,
        prediction=_prediction_text(chosen.directory, device),
    )
    texts = {
        "README.md": readme(facts),
        "Dockerfile": dockerfile(facts),
        ".dockerignore": DOCKERIGNORE,
        "install.sh": install_script(facts),
        "run.sh": RUN,
        "requirements.txt": "\n".join(lines) + "\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    copy_licences(chosen.directory, directory, ROOT)
    measured = {
        "engine": facts.engine,
        "device": device.key if device else CPU,
        "precision": engine_precision(chosen.directory),
        "model_licence": model_licence,
        "predicted": _predicted(chosen.directory, device),
        "made_from": dict(manifest["measured"]),
    }
    _seal(directory, chosen.directory, manifest, measured)


def _copy_runtime(target: Path) -> frozenset[str]:
    """Our modules that the commands import; returns the packages that they import."""
    from deploy.__main__ import COMMANDS

    runtime = runtime_of(["deploy.__main__", *(module for module, _ in COMMANDS.values())])
    for module in runtime.modules:
        copy_file(ROOT / module, target / module)
    return runtime.packages


def _seal(
    directory: Path, engine: Path, manifest: Mapping[str, Any], measured: Mapping[str, Any]
) -> None:
    """SHA256SUMS for sha256sum, and the manifest. No clock: equal content gives equal archives."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (directory / SUMS).write_text(lines, encoding="utf-8", newline="\n")
    sums[SUMS] = sha256_file(directory / SUMS)
    write_json(
        directory / MANIFEST,
        {
            "kind": KIND,
            "schema": SCHEMA_VERSION,
            "created": manifest.get("created"),
            "parent": sha256_file(engine / MANIFEST),
            "argv": ["python", "-m", "deploy", "bundle"],
            "seed": manifest.get("seed", 0),
            "python": manifest.get("python"),
            "libraries": manifest.get("libraries", {}),
            "measured": measured,
            "files": {
                name: {"size_bytes": (directory / name).stat().st_size, "sha256": digest}
                for name, digest in sorted(sums.items())
            },
        },
    )


def _predicted(engine: Path, device: Device | None) -> dict[str, Any] | None:
    if device is None or not (engine / "plan.json").is_file():
        return None
    return predictions(engine, [device], [engine_precision(engine)])[0].to_json()


def _prediction_text(engine: Path, device: Device | None) -> str:
    predicted = _predicted(engine, device)
    if predicted is None:
        return ""
    return (
        f"Predicted ceiling of decoding, one stream: {predicted['decode_ceiling_tokens_per_s']} "
        f"tokens/s ({predicted['basis']})."
    )


def _model_name(engine: Path) -> str:
    """The run folder's name, or the engine's where there is none."""
    engine = engine.absolute()
    return engine.name if engine_name(engine) == engine.name else engine.parents[1].name


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _require_out(out: Path, overwrite: bool) -> None:
    if not out.name.endswith(".tar.gz") or out.name == ".tar.gz":
        raise UserError(f"{out}: allowed is a name that ends in .tar.gz; choose such a one")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists already; name another archive, or give --overwrite")
