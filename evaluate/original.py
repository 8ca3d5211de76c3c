"""The dense original, so that students meet it as an equal: in PyTorch and in their own engines.

It is written once, beside the runs, as a student directory that keeps every module. Loading that
takes a second where dequantising a GGUF takes twenty, and its engines come from the same exporter
as a student's. Without them a student in int4 would be compared with a dense model in PyTorch,
which says nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from distill.artifact import UserError, read_json, staged, write_manifest
from distill.plan import Plan, keep_decisions, modules_of
from distill.quiet import quiet_transformers
from distill.student_format import count_macs, save_student
from distill.teacher import Loaded, load_teacher, target_modules
from evaluate.contenders import Contender, Failure, Lineup, find_contenders

RANK_MULTIPLE = 32
Engines = set[tuple[str, str, str]]  # engine, precision, provider


def written_original(lineup: Lineup) -> Path:
    """The run folder of the dense original, `cache/dense-FINGERPRINT-DTYPE` beside the first run.

    Its weights are written in the first student's precision: only so can their bytes be compared.

    Raises: UserError when the teacher is gone or is no longer the one that the runs were made from.
    """
    dtype = read_json(lineup.runs[0] / "student" / "config.json").get("dtype", "float32")
    name = f"dense-{lineup.teacher_fingerprint[:16]}-{dtype}"
    run = lineup.runs[0].parent / "cache" / name
    run.mkdir(parents=True, exist_ok=True)
    with FileLock(run / ".lock"):
        if not (run / "student" / "manifest.json").is_file():
            print("writing down the dense original for comparison", file=sys.stderr)
            write_dense(run, _teacher(lineup, getattr(torch, dtype)))
    return run


def dense_contenders(
    lineup: Lineup, run: Path, *, engines: bool
) -> tuple[list[Contender], list[Failure]]:
    """The dense original in PyTorch and, with `engines`, in every engine and precision that a
    student has; what the runs hold already (a student of F = 1) is left out.

    Engines are lowered and quantised with ``python -m export``; what is there is used again. What
    cannot be built is a failure, not an error.
    """
    have = _keys(c for c in lineup.contenders if c.group == "dense")
    wanted = {("pytorch", "fp32", "cpu")}
    if engines:
        wanted |= _keys(c for c in lineup.contenders if c.engine == "ort")
    wanted -= have
    with FileLock(run / ".lock"):
        failures = _export_missing(run, wanted)
    found = find_contenders([str(run)])
    named = [_named(c, lineup) for c in found.contenders if _key(c) in wanted]
    return named, [*failures, *found.failures]


def write_dense(run: Path, teacher: Loaded) -> None:
    """Commit the teacher as a student directory that keeps every module."""
    plan = Plan(
        1.0, "budgeted", "keep", RANK_MULTIPLE,
        tuple(keep_decisions(modules_of(target_modules(teacher.model)))),
    )  # fmt: skip
    with quiet_transformers(), staged(run / "student") as partial:
        save_student(partial, teacher.model, teacher.tokenizer, {})
        plan.save(partial / "plan.json")
        cost = count_macs(partial)
        figures = {
            "parameters": cost.parameters,
            "target_macs": cost.target,
            "head_macs": cost.head,
            "total_macs": cost.total,
        }
        write_manifest(
            partial,
            kind="student",
            parent=None,
            argv=["python", "-m", "evaluate"],
            seed=0,
            measured={
                "budget": 1.0,
                "macs_fraction": 1.0,
                "teacher": figures,
                "student": figures,
                "heldout": None,
                "teacher_source": teacher.source,
                "teacher_fingerprint": teacher.fingerprint,
            },
        )


def _teacher(lineup: Lineup, dtype: torch.dtype) -> Loaded:
    """The teacher as the runs' own request asked for it, checked against their fingerprint."""
    request: dict[str, Any] = {}
    if (lineup.runs[0] / "request.json").is_file():
        request = read_json(lineup.runs[0] / "request.json")
    teacher = load_teacher(
        lineup.teacher_source,
        dtype=dtype,
        revision=request.get("revision"),
        trust_remote_code=bool(request.get("trust_remote_code")),
    )
    if teacher.fingerprint != lineup.teacher_fingerprint:
        raise UserError(
            f"the teacher {lineup.teacher_source} is now {teacher.fingerprint[:12]}; needs "
            f"{lineup.teacher_fingerprint[:12]}, which {lineup.runs[0]} was distilled from; put "
            "that model back, or distil again"
        )
    return teacher


def _named(contender: Contender, lineup: Lineup) -> Contender:
    """Called "dense" whatever its folder; MACs as a share of what the students were cut from."""
    plan = next(c.plan for c in lineup.contenders if c.plan is not None)
    return replace(
        contender,
        run="dense",
        id=f"dense/{contender.id.partition('/')[2]}",
        macs_fraction=contender.target_macs / plan.dense_macs,
    )


def _export_missing(run: Path, wanted: Engines) -> list[Failure]:
    """Build what is missing: together, which loads the model once, then one by one what failed."""
    missing = sorted(wanted - _keys(find_contenders([str(run)]).contenders))
    for provider in dict.fromkeys(provider for _, _, provider in missing):
        _export(run, provider, [name for _, name, its in missing if its == provider])
    failures = []
    for _, precision, provider in sorted(
        wanted - _keys(find_contenders([str(run)]).contenders) if missing else ()
    ):
        message = _export(run, provider, [precision])
        if message:
            name = f"dense/engine-ort-{precision}-{provider}"
            failures.append(Failure(name, "export", message))
    return failures


def _export(run: Path, provider: str, precisions: Sequence[str]) -> str | None:
    """Run the export; None when it worked, else the last line it wrote."""
    command = [sys.executable, "-m", "export", "--run", str(run), "--engine", "ort"]
    command += ["--precision", *precisions, "--provider", provider]
    print(f"exporting the dense original in {', '.join(precisions)}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _keys(contenders: Iterable[Contender]) -> Engines:
    return {_key(c) for c in contenders}


def _key(contender: Contender) -> tuple[str, str, str]:
    return contender.engine, contender.precision, contender.provider
