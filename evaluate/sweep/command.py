"""``python -m evaluate sweep``: a family of budgets and its baselines, from training to one report.

Every student is a run folder of its own below one parent, so that all share its cache: the
teacher's text and outputs are written once, the statistics once. Each step is a command line of
this toolkit; what is finished is not done again, an interrupted training goes on, and a budget that
fails is named at the end while the rest is finished and reported.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from distill.args import DistilArgs
from distill.artifact import UserError, read_json, write_json
from distill.builtin import BUILTIN
from distill.console import table
from distill.documents import load_documents
from distill.model_source import directory_from_source
from distill.units import duration
from evaluate.sweep.args import SweepArgs, parse_sweep
from evaluate.sweep.eta import Step, Took, seconds_left
from evaluate.sweep.plan import (
    Student,
    commands_of,
    is_there,
    require_same_request,
    steps_of,
    students_of,
)

STATE = "sweep.json"


@dataclass(frozen=True)
class Outcome:
    """How one student's commands ended: `failed` names the command that did not work."""

    student: Student
    failed: str | None


def sweep(argv: Sequence[str], command: Sequence[str]) -> int:
    """Carry out a sweep. Exit status 0, or 1 when a budget failed or a contender did.

    Raises: UserError for flags, models and text files that cannot be, before anything runs.
    """
    args = parse_sweep(argv)
    require_same_request(args)
    if not all((s.directory / "student").is_dir() for s in students_of(args)):
        _require_sources(args.distil)
    parent = Path(args.run)
    if parent.is_file():
        raise UserError(f"--run {parent}: is a file; needs a folder; name another")
    parent.mkdir(parents=True, exist_ok=True)
    clock = Clock(args, parent / STATE)
    clock.show()
    outcomes = [_make(student, args, clock) for student in students_of(args)]
    finished = [o.student for o in outcomes if (o.student.directory / "student").is_dir()]
    for outcome in outcomes:
        if outcome.failed:
            print(f"failed: {outcome.student.name}: {outcome.failed}", file=sys.stderr)
    if not finished:
        print("error: no budget could be finished; nothing to evaluate", file=sys.stderr)
        return 1
    report = _report_command(args, [s.directory for s in finished])
    status = clock.timed("evaluate", lambda: _run(report))
    clock.close()
    _print_outcomes(outcomes)
    failed = any(outcome.failed for outcome in outcomes)
    return status if status not in (0, 1) else int(failed or bool(status))


def _require_sources(args: DistilArgs) -> None:
    """Raise what every budget would fail of: models and text files that cannot be read."""
    for source in dict.fromkeys((args.teacher, args.student)):
        if source is not None and source not in BUILTIN:
            directory_from_source(
                source, revision=args.revision, trust_remote_code=args.trust_remote_code
            )
    files = [s for s in args.data if s != "self" and not s.startswith("hub:")]
    if files:
        load_documents(files)


class Clock:
    """Times steps, keeps the seconds in the sweep's state file and says when all will be done."""

    def __init__(self, args: SweepArgs, path: Path) -> None:
        self._steps: list[Step] = steps_of(args)
        self._path = path
        self._took: dict[str, Took] = {}
        if path.is_file():
            names = {step.name for step in self._steps} - {"evaluate"}
            recorded = read_json(path)["took"].items()
            self._took = {name: Took(**times) for name, times in recorded if name in names}
        self._began = time.monotonic()
        self._predicted: list[dict[str, float]] = []

    def timed(
        self,
        name: str,
        call: Callable[[], int],
        work_s: Callable[[], float] = lambda: 0.0,
        *,
        is_there: bool = False,
    ) -> int:
        """Run one step; seconds of steps that work count, and the ETA is shown after each.

        `work_s` says, once the step is done, how many seconds its work took (0: all of them). What
        a step finds done (`is_there`) says nothing about the machine's speed.
        """
        began = time.monotonic()
        status = call()
        seconds = time.monotonic() - began if status in (0, 1) and not is_there else 0.0
        before = self._took.get(name, Took(0.0, 0.0))
        if seconds > before.seconds or name not in self._took:
            self._took[name] = Took(seconds, work_s() or seconds)
        self.show()
        return status

    def show(self) -> None:
        left = [step for step in self._steps if step.name not in self._took]
        if not left:
            return
        seconds = seconds_left(self._steps, self._took)
        elapsed = time.monotonic() - self._began
        self._predicted.append({"after_s": elapsed, "predicted_total_s": elapsed + seconds})
        guess = " (a first guess: nothing is timed yet)" if not self._took else ""
        print(
            f"sweep: {len(self._steps) - len(left)} of {len(self._steps)} steps done, "
            f"ETA {duration(seconds)}{guess}; next: {left[0].name}",
            file=sys.stderr,
            flush=True,
        )
        self._save()

    def close(self) -> None:
        """Record how long it all took beside what was predicted on the way."""
        self._save(total_s=time.monotonic() - self._began)

    def _save(self, **more: float) -> None:
        took = {name: asdict(times) for name, times in self._took.items()}
        write_json(self._path, {"took": took, "eta": self._predicted, **more})


def _make(student: Student, args: SweepArgs, clock: Clock) -> Outcome:
    """Train and export one student; a failure is recorded and leaves the rest alone."""
    for name, command in commands_of(student, args):
        status = clock.timed(
            name, partial(_run, command), partial(_training_s, student, name),
            is_there=is_there(student, args, name),
        )  # fmt: skip
        if status == 130:
            raise KeyboardInterrupt
        if status != 0:
            return Outcome(student, f"{' '.join(command[1:])} ended with status {status}")
    return Outcome(student, None)


def _run(command: Sequence[str]) -> int:
    """Run a command with its own output on ours; on Ctrl-C it ends first. Nothing to run is 0."""
    if not command:
        return 0
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _training_s(student: Student, name: str) -> float:
    """Seconds that a finished training spent in its steps, from its manifest."""
    path = student.directory / "student" / "manifest.json"
    if not name.startswith("train") or not path.is_file():
        return 0.0
    training = read_json(path)["measured"].get("training") or {}
    return float(training.get("tokens", 0) / training.get("tokens_per_s", float("inf")))


def _report_command(args: SweepArgs, runs: Sequence[Path]) -> list[str]:
    flags = list(args.evaluate_flags)
    if "--out" not in flags:
        flags += ["--out", str(Path(args.run) / "report")]
    return [sys.executable, "-m", "evaluate", "--run", *map(str, runs), *flags]


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    rows = [[o.student.name, str(o.student.directory), o.failed or "done"] for o in outcomes]
    table("sweep", ["student", "run", "outcome"], rows)
