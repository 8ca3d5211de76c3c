"""Measure exports of real students on the CPU and write the tables of docs/export.md.

    python scripts/measure_lowering.py speed --runs runs/measure/f50 runs/measure/f25
    python scripts/measure_lowering.py choices --runs runs/measure/f50 runs/measure/f25
    python scripts/measure_lowering.py            # only write the tables from what was measured

`speed` exports every run, and the dense original they came from, in every precision that is not
there yet, then times the target modules alone and the whole models: prefill of 256 tokens, and one
token after 256 cached ones. `choices` times what lowering chose between. All contenders of a figure
take turns in one process, each thread on a core of its own, and rest between calls until no idle
thread spins. Nothing else should run meanwhile: with two threads, a busy core halves the speed. On
two cores `speed` takes 6 minutes and `choices` 4, once the graphs are there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deploy.ceilings import measure_ceilings  # noqa: E402
from distill.artifact import (  # noqa: E402
    MANIFEST,
    library_versions,
    open_artifact,
    staged,
    write_json,
    write_manifest,
)
from distill.plan import Plan, keep_decisions, modules_of  # noqa: E402
from distill.student_format import count_macs, save_student  # noqa: E402
from distill.teacher import load_teacher, target_modules  # noqa: E402
from evaluate.environment import describe_machine  # noqa: E402
from evaluate.module_time import time_modules  # noqa: E402
from evaluate.timing import SPIN_S  # noqa: E402
from scripts.export_page import write_page  # noqa: E402
from scripts.lowering_choices import measure_choices  # noqa: E402
from scripts.model_speed import time_models  # noqa: E402
from scripts.thread_pins import ThreadPins  # noqa: E402

MEASURED = ROOT / "docs" / "measured"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
FIGURES = (
    "nodes", "matmul_nodes", "dense_matmuls", "factored_matmuls", "removed", "macs_per_token",
    "weight_bytes", "lowering_s", "seconds",
)  # fmt: skip
PARITY = (
    "tokens", "max_logit_difference", "mean_logit_difference", "kl", "top1_agreement", "ties",
    "cross_entropy_change", "perplexity_ratio", "greedy_matches", "greedy_steps", "seconds",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["speed", "choices"])
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="run folders of students")
    parser.add_argument("--dense", type=Path, help="run folder of the dense original (written)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds of the calling thread: fair on a busy machine, one thread only",
    )
    args = parser.parse_args(argv)
    if args.what and not args.runs:
        parser.error("--runs is missing: name the run folders to measure")
    if args.what == "choices":
        write_json(MEASURED / "lowering.json", choices(args))
    if args.what == "speed":
        write_json(MEASURED / "export.json", speed(args))
    write_page(MEASURED)
    return 0


def choices(args: argparse.Namespace) -> dict[str, Any]:
    clock = time.thread_time if args.cpu_time else time.perf_counter
    students = {run.name: run / "student" for run in args.runs}
    with tempfile.TemporaryDirectory() as folder:
        with ThreadPins() as pins:
            found = measure_choices(
                students, Path(folder), args.threads, args.rounds, clock, pins.pin
            )
    return {**machine(), "clock": clock.__name__, **found}


def speed(args: argparse.Namespace) -> dict[str, Any]:
    dense = args.dense or args.runs[0].parent / "dense"
    source = open_artifact(args.runs[0] / "student", "student")["measured"]["teacher_source"]
    if not (dense / "student" / MANIFEST).is_file():
        write_dense(dense, source)
    runs = {"dense": dense, **{run.name: run for run in args.runs}}
    for run in runs.values():
        exported(run, args.precisions)
    plans = {name: Plan.load(runs[name] / "student" / "plan.json") for name in runs}
    before = [measure_ceilings(count) for count in args.threads]
    students = {name: plan for name, plan in plans.items() if name != "dense"}
    with ThreadPins() as pins:
        modules = time_modules(students, rounds=args.rounds, threads=args.threads, on_call=pins.pin)
        calls = time_models(runs, args.precisions, args.threads, args.rounds, pins.pin)
    ceilings = [rates.best_of(measure_ceilings(rates.threads)) for rates in before]
    return {
        **machine(),
        "teacher": source,
        "ceilings": {str(rates.threads): rates.to_json() for rates in ceilings},
        "runs": {name: figures_of(run, args.precisions) for name, run in runs.items()},
        "rest_s": SPIN_S,
        "modules": modules.to_json(),
        "dense_macs": plans["dense"].dense_macs,
        "calls": calls,
    }


def exported(run: Path, precisions: Sequence[str]) -> None:
    """Run the export; what is finished is kept. Exits with its status when it fails."""
    command = [sys.executable, "-m", "export", "--run", str(run), "--engine", "ort"]
    status = subprocess.run([*command, "--precision", *precisions], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def figures_of(run: Path, precisions: Sequence[str]) -> dict[str, Any]:
    """Manifest figures of every graph and engine of a run."""
    engines = {}
    for precision in precisions:
        graph = open_artifact(run / "onnx" / f"ort-{precision}", "onnx")["measured"]
        engine = open_artifact(run / "engine-ort" / f"{precision}-cpu", "engine-ort")["measured"]
        engines[precision] = {
            **{name: graph[name] for name in FIGURES},
            "parity": {name: graph["parity"][name] for name in PARITY},
            "engine_bytes": engine["weight_bytes"],
            "load_s": engine["load_s"],
            "load_unoptimised_s": engine["load_unoptimised_s"],
        }
    return engines


def write_dense(run: Path, source: str) -> None:
    """Commit the teacher as a student directory that keeps every module."""
    teacher = load_teacher(source, dtype=torch.float32)
    decisions = keep_decisions(modules_of(target_modules(teacher.model)))
    plan = Plan(1.0, "budgeted", "keep", 32, tuple(decisions))
    with staged(run / "student") as partial:
        save_student(partial, teacher.model, teacher.tokenizer, {})
        plan.save(partial / "plan.json")
        cost = count_macs(partial)
        measured = {"macs_fraction": 1.0, "student": {"parameters": cost.parameters}}
        write_manifest(
            partial, kind="student", parent=None, argv=sys.argv, seed=0, measured=measured
        )


def machine() -> Mapping[str, Any]:
    return {
        "machine": describe_machine(),
        "load": os.getloadavg()[0],
        "libraries": library_versions(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
