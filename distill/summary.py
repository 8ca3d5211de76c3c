"""The tables that a run prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from distill.console import table
from distill.plan import ACTIONS, Decision, Plan


def print_plan(plan: Plan) -> None:
    """One row a layer, one column a module: ``dense``, the rank, the neurons and ``n`` where
    narrowed, or ``-`` where removed."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for decision in plan.decisions:
        layer, _, leaf = decision.module.removeprefix("model.layers.").partition(".")
        rows[layer][leaf.rpartition(".")[2]] = _cell(decision)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table(
        f"plan at budget {plan.budget:g}: rank of each module (multiples of {plan.rank_multiple}; "
        "n: neurons of a narrowed MLP, dense: kept, -: removed)",
        ["layer", *columns],
        [[layer, *(row.get(name, "") for name in columns)] for layer, row in rows.items()],
    )
    counts = Counter(d.action for d in plan.decisions)
    print(
        f"MACs per token {plan.macs:,} of {plan.dense_macs:,} "
        f"({plan.macs / plan.dense_macs:.4f}, allowed {plan.budget:g}); "
        + ", ".join(f"{action} {counts[action]}" for action in ACTIONS)
    )


def _cell(decision: Decision) -> str:
    if decision.action == "keep":
        return "dense"
    if decision.action == "narrow":
        return f"{decision.rank}n"
    return str(decision.rank) if decision.action == "approximate" else "-"


def print_summary(measured: Mapping[str, Any]) -> None:
    """Teacher against student: parameters, MACs, held-out perplexity and KL."""
    teacher, student = measured["teacher"], measured["student"]
    rows = [
        ["parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"],
        ["target MACs per token", f"{teacher['target_macs']:,}", f"{student['target_macs']:,}"],
        ["fraction of the target MACs", "1", f"{measured['macs_fraction']:.4f}"],
        ["MACs per token with head", f"{teacher['total_macs']:,}", f"{student['total_macs']:,}"],
    ]
    heldout = measured["heldout"]
    if heldout is not None:
        rows += [
            [
                f"held-out perplexity ({heldout['tokens']:,} tokens)",
                f"{heldout['teacher_perplexity']:.2f}",
                f"{heldout['student_perplexity']:.2f}",
            ],
            ["KL to the teacher (nats per token)", "0", f"{heldout['kl']:.3f}"],
        ]
    table("result", ["", "teacher", "student"], rows)
