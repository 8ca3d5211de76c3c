"""The end of a run: the student is written, counted, measured, pictured and committed."""

from __future__ import annotations

import resource
import sys
from typing import Any

from transformers import PreTrainedModel

from distill.artifact import staged, write_manifest
from distill.card import write_model_card
from distill.console import progress
from distill.hardware import rate_by_now
from distill.heldout import HeldoutScores, score_heldout
from distill.pictures import plot_module_map, plot_training
from distill.plan import Plan
from distill.quiet import quiet_transformers
from distill.rundir import Run
from distill.student_format import (
    Macs,
    count_macs,
    dense_macs_from_config,
    save_dense_copy,
    save_student,
)
from distill.summary import print_plan, print_summary
from distill.training_log import read_training_log


class BudgetExceeded(AssertionError):
    """The written tensors cost more than the budget allows: a defect, never the user's mistake."""


def measure_heldout(run: Run, student: PreTrainedModel) -> HeldoutScores:
    """Teacher and student on the text that training never saw."""
    ids_NT = run.text.heldout_NT
    with progress(ids_NT.size, "held-out text", enabled=run.accelerator.is_main_process) as bar:
        return score_heldout(run.teacher.model, student, ids_NT, bar.update)


def commit_student(
    run: Run, student: PreTrainedModel, plan: Plan, heldout: HeldoutScores, seconds: float
) -> None:
    """Write ``student``, prove its MACs from the written tensors, commit it.

    Raises BudgetExceeded rather than commit a student above its budget.
    """
    final = run.directory / "student"
    plan.save(run.directory / "plan.json")
    with quiet_transformers(), staged(final) as partial:
        save_student(partial, student, run.student.tokenizer, plan.ranks, plan.widths)
        plan.save(partial / "plan.json")
        cost = count_macs(partial)
        dense = dense_macs_from_config(student.config)
        _check(cost, dense, plan)
        measured = _measured(run, plan, cost, dense, heldout, seconds)
        write_model_card(partial, _facts(run, plan, measured))
        manifest_hash = write_manifest(
            partial, kind="student", parent=None,
            argv=list(run.argv), seed=run.args.seed, measured=measured,
        )  # fmt: skip
    if run.args.dense_copy:
        with quiet_transformers(), staged(run.directory / "student-dense") as partial:
            save_dense_copy(partial, student, run.student.tokenizer)
            write_manifest(
                partial, kind="student-dense", parent=manifest_hash,
                argv=list(run.argv), seed=run.args.seed, measured={},
            )  # fmt: skip
    plot_module_map(plan.to_json(), run.directory / "modules.png")
    if (run.directory / "log.jsonl").exists():
        plot_training(
            run.directory / "log.jsonl", run.directory / "training.png", budget=plan.budget
        )
    print_plan(plan)
    print_summary(measured)
    print(f"student: {final}")


def _check(cost: Macs, dense: Macs, plan: Plan) -> None:
    allowed = plan.budget * dense.target
    if cost.target > allowed + 1e-6:
        raise BudgetExceeded(f"{cost.target:,} MACs written, {allowed:,.0f} allowed")


def _measured(
    run: Run, plan: Plan, cost: Macs, dense: Macs, heldout: HeldoutScores, seconds: float
) -> dict[str, Any]:
    teacher = dense_macs_from_config(run.teacher.model.config)
    return {
        "budget": plan.budget,
        "macs_fraction": cost.target / dense.target,
        "teacher": _cost_json(teacher),
        "student": _cost_json(cost),
        "heldout": heldout.to_json(),
        "training": training_figures(run),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "teacher_source": run.teacher.source,
        "teacher_fingerprint": run.teacher.fingerprint,
    }


def _cost_json(cost: Macs) -> dict[str, int]:
    return {
        "parameters": cost.parameters,
        "target_macs": cost.target,
        "head_macs": cost.head,
        "total_macs": cost.total,
    }


def training_figures(run: Run) -> dict[str, float]:
    """Tokens, and medians over the logged steps of speed and model-FLOP utilisation."""
    path = run.directory / "log.jsonl"
    lines = read_training_log(path) if path.exists() else []
    if not lines:
        return {"tokens": 0}
    middle = len(lines) // 2
    rate = rate_by_now(run.compute)
    return {
        "tokens": lines[-1]["tokens"],
        "tokens_per_s": sorted(line["tokens_per_s"] for line in lines)[middle],
        "utilisation": sorted(line["flops_per_s"] for line in lines)[middle] / rate,
        "matmul_flops_per_s": rate,
    }


def print_utilisation(run: Run) -> None:
    """Speed of the training just done against the machine's measured matmul rate."""
    if not run.accelerator.is_main_process:
        return
    figures = training_figures(run)
    if figures["tokens"]:
        precision = str(run.compute.dtype).removeprefix("torch.")
        print(
            f"trained at {figures['tokens_per_s']:.0f} tokens/s, utilisation "
            f"{figures['utilisation']:.2f} of {figures['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s "
            f"({precision} matmul of this machine)",
            file=sys.stderr,
        )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _facts(run: Run, plan: Plan, measured: dict[str, Any]) -> dict[str, Any]:
    return {"plan": plan.to_json(), "args": vars(run.args), "measured": measured}
