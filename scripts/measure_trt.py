"""Measure TensorRT-RTX builds of real students, without a GPU, into docs/measured/trt.json.

    python scripts/measure_trt.py dense=runs/measure/dense f25=runs/measure/f25
    python scripts/measure_trt.py dense=DIR f25=DIR --precisions fp16 int8 --repeats 3

Also read: what the exports of those runs say about their graphs in plain operators, which kits for
older TensorRT hold (python -m export --run RUN --engine trt --target sm87 --precision fp16 int8).
Each build runs in a process of its own, so that its peak memory is its own; students take turns.
Engine bytes do not depend on the machine; seconds do, so let nothing else run. No engine is run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distill.artifact import (  # noqa: E402
    MANIFEST,
    open_artifact,
    write_json,
    write_manifest,
)
from evaluate.environment import describe_machine  # noqa: E402
from export.engine_trt import build_engine, host_bytes_needed  # noqa: E402
from export.lower import Precision, lower, save_onnx  # noqa: E402
from export.quantize import quantize  # noqa: E402

RESULT = ROOT / "docs" / "measured" / "trt.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
QUANTISED = ("int8", "int4")
PARITY = ("max_logit_difference", "kl", "top1_agreement", "cross_entropy_change")
LIMITS: dict[str, Any] = {
    "max_batch": 4,
    "max_seq": 512,
    "max_past": 2047,
    "workspace_bytes": 2**30,
}


def lower_student(student: Path, directory: Path, precision: str) -> float:
    """Write an "onnx" artefact of the standard flavour without its parity proof; seconds."""
    directory.mkdir(parents=True)
    start_s = time.perf_counter()
    if precision in QUANTISED:
        full = directory.with_name(directory.name + "-fp32")
        lower_student(student, full, "fp32")
        start_s = time.perf_counter()
        quantize(full, directory, precision, show_progress=False)
        (directory / MANIFEST).unlink(missing_ok=True)
    else:
        model = lower(student, flavour="standard", precision=cast(Precision, precision))
        save_onnx(model, directory)
        shutil.copyfile(student / "config.json", directory / "config.json")
    seconds = time.perf_counter() - start_s
    measured = {"flavour": "standard", "precision": precision}
    write_manifest(directory, kind="onnx", parent=None, argv=sys.argv, seed=0, measured=measured)
    return seconds


def build_once(onnx_directory: Path, engine_directory: Path) -> None:
    """Build for every target that can be built ahead of time; prints the figures as JSON."""
    report = build_engine(onnx_directory, engine_directory, targets=None, argv=sys.argv, **LIMITS)
    record = report.record
    assert record is not None
    onnx_bytes = sum(file["bytes"] for file in record["onnx"]["files"].values())
    figures = {
        "targets": list(report.place.here),
        "version": record["version"],
        "layers": len(record["layers"]),
        "onnx_bytes": onnx_bytes,
        "engine_bytes": report.engine_bytes,
        "build_seconds": record["build_seconds"],
        "peak_host_bytes": record["peak_host_bytes"],
        "estimated_host_bytes": host_bytes_needed(onnx_bytes),
    }
    print(json.dumps(figures))


def build_in_process(onnx_directory: Path, engine_directory: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--once", str(onnx_directory), str(engine_directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(engine_directory)
    return json.loads(done.stdout.splitlines()[-1])


def measure(students: dict[str, Path], precision: str, repeats: int) -> list[dict[str, Any]]:
    """One row a student: bytes, median and range of the build seconds, peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        onnx = {name: Path(scratch) / name for name in students}
        lowering = {n: lower_student(students[n], onnx[n], precision) for n in students}
        builds: dict[str, list[dict[str, Any]]] = {name: [] for name in students}
        for _ in range(repeats):
            for name in students:
                builds[name].append(build_in_process(onnx[name], Path(scratch) / "engine"))
    rows = []
    for name, results in builds.items():
        seconds = [result["build_seconds"] for result in results]
        manifest = open_artifact(students[name], "student")["measured"]
        rows.append(
            {
                "student": name,
                "precision": precision,
                "macs_fraction": manifest.get("macs_fraction"),
                **results[0],
                "lowering_seconds": lowering[name],
                "build_seconds": statistics.median(seconds),
                "build_seconds_range": [min(seconds), max(seconds)],
                "peak_host_bytes": max(result["peak_host_bytes"] for result in results),
            }
        )
    return rows


def plain_graphs(students: dict[str, Path]) -> list[dict[str, Any]]:
    """Manifest figures of every run's graphs in plain operators."""
    rows = []
    for name, student in students.items():
        for precision in PRECISIONS:
            directory = student.parent / "onnx" / f"plain-{precision}"
            if not (directory / MANIFEST).is_file():
                continue
            measured = open_artifact(directory, "onnx")["measured"]
            rows.append(
                {
                    "student": name,
                    "precision": precision,
                    **{key: measured[key] for key in ("nodes", "weight_bytes")},
                    "eight_bit_matrices": measured.get("eight_bit_matrices"),
                    "parity": {key: measured["parity"][key] for key in PARITY},
                }
            )
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add engine bytes ÷ those of the row called "dense" with the same precision."""
    dense = {row["precision"]: row["engine_bytes"] for row in rows if row["student"] == "dense"}
    return [
        {**row, "engine_bytes_of_dense": row["engine_bytes"] / dense[row["precision"]]}
        if row["precision"] in dense
        else row
        for row in rows
    ]


def students_of(arguments: list[str], parser: argparse.ArgumentParser) -> dict[str, Path]:
    """NAME=RUN pairs as student directories."""
    found = {}
    for argument in arguments:
        name, _, run = argument.partition("=")
        directory = Path(run) / "student"
        if not (directory / MANIFEST).is_file():
            parser.error(f"{argument}: needs NAME=RUN, RUN holding a finished student directory")
        found[name] = directory
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("students", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        build_once(Path(args.students[0]), Path(args.students[1]))
        return
    students = students_of(args.students, parser)
    rows: list[dict[str, Any]] = []
    for precision in args.precisions:
        rows += measure(students, precision, args.repeats)
        result = {
            "limits": LIMITS,
            "machine": describe_machine(),
            "rows": with_ratios(rows),
            "plain": plain_graphs(students),
        }
        write_json(args.result, result)
        print(f"{precision}: {args.result}", file=sys.stderr)


if __name__ == "__main__":
    main()
