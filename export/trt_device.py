"""Build the engine of a build kit on the device that will run it, with TensorRT alone.

A kit is a directory that `python -m export --engine trt --target sm87` wrote. It carries this file
as build.py, which needs Python 3.10 and the module tensorrt: no torch, no numpy, nothing of ours
but the files beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.trt_api import PRODUCT, BuildError, Flavour, TensorRt, load_tensorrt
from export.trt_builder import BuildSettings, allows_tf32, engine_from_onnx, release_of
from export.trt_record import ENGINE, check_files, write_engine
from export.trt_targets import KNOWN, gpu_sm

KIT = "kit.json"
ONNX = "model.onnx"
REMEDY = "copy the whole kit again from the machine that made it"
SAY_EVERY_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 an error that one line explains, 130 interrupted."""
    try:
        build_kit(parsed(argv))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written; give the same command again", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file of this kit'}; needs "
            "free disk and readable files; put that right and give the command again",
            file=sys.stderr,
        )
        return 2
    return 0


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 build.py", description="Build this kit's TensorRT engine for the GPU here."
    )
    parser.add_argument("--kit", type=Path, default=Path(sys.argv[0]).resolve().parent)
    parser.add_argument("--output", type=Path, help="where the engine goes (default: the kit)")
    parser.add_argument("--workspace-mib", type=int, help="most device memory for tactics, MiB")
    parser.add_argument("--timing-cache", type=Path, help="default: timing.cache in the kit")
    parser.add_argument("--any-gpu", action="store_true", help="build for another GPU than meant")
    parser.add_argument("--flavour", choices=sorted(PRODUCT), default="tensorrt")
    args = parser.parse_args(argv)
    if args.workspace_mib is not None and args.workspace_mib < 1:
        parser.error(f"--workspace-mib {args.workspace_mib}: needs a positive number of MiB")
    return args


def build_kit(args: argparse.Namespace) -> dict[str, Any]:
    """Check the kit and the GPU, build, write model.engine and build.json; returns the record."""
    kit = read_kit(args.kit)
    ahead = args.flavour == "tensorrt_rtx"
    targets = tuple(kit["targets"]) if ahead else (_target_here(kit["targets"], args.any_gpu),)
    check_files(args.kit, kit["files"], REMEDY)
    trt = load_tensorrt(args.flavour)
    _require_release(trt, args.flavour, tuple(kit["first_release"]))
    output = args.output or args.kit
    output.mkdir(parents=True, exist_ok=True)
    _require_disk(output, kit)
    settings = BuildSettings(
        flavour=args.flavour,
        profiles=kit["profiles"],
        targets=targets if ahead else (),
        workspace_bytes=(args.workspace_mib or kit["workspace_bytes"] >> 20) << 20,
        tf32=allows_tf32(kit["made_from"]["precision"]),
        timing_cache=args.timing_cache or args.kit / "timing.cache",
    )
    say(f"building for {', '.join(targets)} with {PRODUCT[args.flavour]} {trt.__version__}")
    path = args.kit / ONNX
    built = engine_from_onnx(trt, path.read_bytes(), path, settings, Ticker())
    made_from = {**kit["made_from"], "targets": list(targets)}
    record = write_engine(output, built, settings, made_from)
    say(f"{output / ENGINE}: {record['engine']['bytes']:,} bytes in {built.seconds:.0f} s")
    return record


def read_kit(directory: Path) -> dict[str, Any]:
    """Raises: BuildError when kit.json is missing or damaged."""
    path = directory / KIT
    try:
        kit = json.loads(path.read_text(encoding="utf-8"))
        if not {"files", "profiles", "targets", "workspace_bytes", "made_from"} <= kit.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise BuildError(f"{path} cannot be read ({error}); needs a whole kit; {REMEDY}") from None
    return kit


def _target_here(targets: Sequence[str], any_gpu: bool) -> str:
    here = gpu_sm()
    if here is None:
        raise BuildError(
            "no NVIDIA GPU answers here (libcuda.so.1); needs the device that will run the "
            "engine; in a container add: --gpus all (on a Jetson: --runtime nvidia)"
        )
    if here not in targets and not any_gpu:
        raise BuildError(
            f"the GPU here is {here} ({KNOWN.get(here, 'unknown')}); this kit is for "
            f"{','.join(targets)}; run it there, or add --any-gpu to build for this one"
        )
    return here


def _require_release(trt: TensorRt, flavour: Flavour, first: tuple[int, ...]) -> None:
    if flavour == "tensorrt" and release_of(trt) < first:
        raise BuildError(
            f"TensorRT {trt.__version__} is here; this kit is for {'.'.join(map(str, first))} or "
            "newer, whose parser knows its operators; update TensorRT"
        )


def _require_disk(directory: Path, kit: dict[str, Any]) -> None:
    need_bytes = 2 * sum(file["bytes"] for file in kit["files"].values())
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < need_bytes:
        raise BuildError(
            f"{directory} has {free_bytes >> 20} MiB free; the engine needs up to "
            f"{need_bytes >> 20} MiB; free some space or name another directory with --output"
        )


class Ticker:
    """Progress as a plain line at most every ten seconds."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, share: float, phase: str) -> None:
        if time.monotonic() - self._said_s >= SAY_EVERY_S:
            self._said_s = time.monotonic()
            say(f"{share:4.0%}  {phase}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
