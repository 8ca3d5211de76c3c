"""The command line of ``python -m evaluate sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from distill.args import DistilArgs, parse_args
from distill.artifact import UserError
from distill.flags import flag, parse_flags
from evaluate.args import EvaluateArgs, parse_evaluate

BASELINES = ("lora", "svd")
PRECISIONS = ("fp32", "int8", "int4", "none")
OWNED = ("--budget", "--method", "--plan-only", "--resume", "--overwrite", "--shard-teacher")
SHARED_NAMES = ("seed",)


@dataclass(frozen=True)
class SweepFlags:
    """Flags of the sweep itself; every other one goes to ``distill`` or ``evaluate``."""

    budgets: str = flag(
        "1,0.75,0.5,0.35,0.25,0.15",
        "budgets F, joined by commas",
        lambda v: all(_is_budget(b) for b in v.split(",")),
        "numbers with 0 < F ≤ 1",
    )
    baselines: tuple[str, ...] = flag(
        BASELINES, "baselines to train beside them", lambda v: set(v) <= {*BASELINES, "none"},
        "lora, svd (at every budget below 1), or none",
    )  # fmt: skip
    precision: tuple[str, ...] = flag(
        ("fp32", "int8", "int4"), "precisions to export, for ONNX Runtime on the CPU",
        lambda v: set(v) <= set(PRECISIONS), " ".join(PRECISIONS),
    )  # fmt: skip
    run: str = flag("runs/sweep", "parent folder of all runs", bool, "a folder")


@dataclass(frozen=True)
class SweepArgs:
    """What a sweep does; `distil` holds the arguments that all trainings share."""

    budgets: tuple[float, ...]
    baselines: tuple[str, ...]
    precision: tuple[str, ...]
    run: str
    distil: DistilArgs
    distil_flags: tuple[str, ...] = field(default=())
    evaluate_flags: tuple[str, ...] = field(default=())


def parse_sweep(argv: Sequence[str]) -> SweepArgs:
    """Split the flags between sweep, distill and evaluate, and check all three.

    Raises: UserError that reports the wrong flags of a command at once.
    """
    owned = [word for word in argv if word in OWNED]
    if owned:
        raise UserError(
            f"{' '.join(owned)}: the sweep decides this for every run; allowed are --budgets, "
            "--baselines and the other flags of python -m distill; leave it out"
        )
    mine, distil, report = _split(argv)
    values = parse_flags(
        SweepFlags,
        mine,
        prog="python -m evaluate sweep",
        description="Distil a family of budgets and baselines, export and evaluate it. Flags of "
        "python -m distill and python -m evaluate are passed on to them.",
    )
    flags = SweepFlags(**values)
    parsed = parse_args([*distil, "--run", flags.run])
    parse_evaluate(report)
    budgets = sorted({float(b) for b in flags.budgets.split(",")}, reverse=True)
    return SweepArgs(
        budgets=tuple(budgets),
        baselines=tuple(b for b in flags.baselines if b != "none"),
        precision=tuple(p for p in flags.precision if p != "none"),
        run=flags.run,
        distil=parsed,
        distil_flags=tuple(distil),
        evaluate_flags=tuple(report),
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Each flag with its values goes to the command that has it; unknown ones stay with us."""
    sweep_names = {f.name for f in fields(SweepFlags)}
    report_names = {f.name for f in fields(EvaluateArgs)} - sweep_names - set(SHARED_NAMES)
    distil_names = {f.name for f in fields(DistilArgs)} - sweep_names
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    current = 0
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            current = 1 if name in distil_names else 2 if name in report_names else 0
        parts[current].append(word)
    return parts


def _is_budget(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
