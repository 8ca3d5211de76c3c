"""The students of a sweep, the commands that make each, and the steps that an ETA counts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from distill.args import recorded_request, request_json
from distill.artifact import UserError
from evaluate.sweep.args import SweepArgs
from evaluate.sweep.eta import Step, training_work

RESOLVED = {"device", "dtype"}  # "auto" is recorded as what it came to
WITHOUT_EFFECT = {
    "budgeted": set[str](),
    "svd": {"refit_tokens", "allocation", "mlp"},
    "lora": {
        "budget",
        "refit_tokens",
        "allocation",
        "mlp",
        "rank_multiple",
        "anneal",
        "statistics_tokens",
    },
}


@dataclass(frozen=True)
class Student:
    """One run of the sweep."""

    name: str
    budget: float
    method: str
    directory: Path


def students_of(args: SweepArgs) -> list[Student]:
    """Budgets from the largest on, then LoRA, then SVD at every budget below 1.

    The first training also makes what all share: the teacher's text and outputs.
    """
    parent = Path(args.run)
    found = [Student(_name("b", b), b, "budgeted", parent / _name("b", b)) for b in args.budgets]
    if "lora" in args.baselines:
        found.append(Student("lora", 1.0, "lora", parent / "lora"))
    if "svd" in args.baselines:
        found += [
            Student(_name("svd-b", b), b, "svd", parent / _name("svd-b", b))
            for b in args.budgets
            if b < 1
        ]
    return found


def commands_of(student: Student, args: SweepArgs) -> list[tuple[str, list[str]]]:
    """(step's name, command) in order; a training that is finished has an empty command.

    A run that was interrupted is resumed. SVD and LoRA are compared in quality alone: their graphs
    are as large as those of the students of their budget.
    """
    run = str(student.directory)
    train: list[str] = []
    if not (student.directory / "student").is_dir():
        train = [sys.executable, "-m", "distill", "--run", run]
        if (student.directory / "request.json").is_file():
            train += ["--resume"]
        else:
            train += ["--method", student.method, "--budget", f"{student.budget:g}"]
            train += args.distil_flags
    commands = [(f"train {student.name}", train)]
    if args.precision and student.method == "budgeted":
        export = [sys.executable, "-m", "export", "--run", run, "--engine", "ort"]
        export += ["--precision", *args.precision]
        commands.append((f"export {student.name}", export))
    return commands


def is_there(student: Student, args: SweepArgs, step: str) -> bool:
    """Whether the files that a step makes exist before it runs."""
    if step.startswith("train"):
        return (student.directory / "student").is_dir()
    engines = student.directory / "engine-ort"
    return all((engines / f"{precision}-cpu").is_dir() for precision in args.precision)


def require_same_request(args: SweepArgs) -> None:
    """Raises: UserError when a run that is there was started with other arguments, so that one
    report would mix them. None stands for a default that follows from the other arguments, hub data
    sets are read no further than all flags ask for."""
    from_hub = any(spec.startswith("hub:") for spec in args.distil.data)
    for student in students_of(args):
        path = student.directory / "request.json"
        if not path.is_file():
            continue
        asked = request_json(replace(args.distil, budget=student.budget, method=student.method))
        recorded = recorded_request(path)
        for name in (
            asked.keys() - RESOLVED - (set() if from_hub else WITHOUT_EFFECT[student.method])
        ):
            if name in recorded and recorded[name] != asked[name]:
                raise UserError(
                    f"{student.directory} was started with --{name.replace('_', '-')} "
                    f"{recorded[name]}, this sweep asks for {asked[name]}; needs the same "
                    "arguments throughout; give them, or another --run"
                )


def steps_of(args: SweepArgs) -> list[Step]:
    """All steps with their amounts of work, the report's last; it has the dense original too."""
    steps, contenders = [], 1
    for student in students_of(args):
        work = training_work(args.distil.tokens, student.budget, student.method)
        contenders += 1
        for name, _ in commands_of(student, args):
            if name.startswith("train"):
                steps.append(Step(name, "train", work))
            else:
                steps.append(Step(name, "export", len(args.precision)))
                contenders += len(args.precision)
    return [*steps, Step("evaluate", "evaluate", contenders)]


def _name(prefix: str, budget: float) -> str:
    """b75, or b12.5 where a hundredth is not enough."""
    return f"{prefix}{100 * budget:.4g}"
