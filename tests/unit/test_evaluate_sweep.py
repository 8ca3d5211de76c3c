"""A sweep: its commands, its ETA against known costs, what a failure and an interruption leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from distill.args import DistilArgs, parse_args, request_json
from distill.artifact import UserError
from evaluate.sweep import command as module
from evaluate.sweep.args import parse_sweep
from evaluate.sweep.command import sweep
from evaluate.sweep.eta import FIRST_GUESS_S, Step, Took, seconds_left, training_work
from evaluate.sweep.plan import (
    WITHOUT_EFFECT,
    commands_of,
    is_there,
    require_same_request,
    steps_of,
    students_of,
)

BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)


def flags(tmp_path: Path, *more: str) -> list[str]:
    return ["--run", str(tmp_path / "s"), "--tokens", "8192", "--budgets", "1,0.5,0.25", *more]


def test_students_and_commands(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path, "--text", "t.txt"))
    students = students_of(args)
    names = [s.name for s in students]
    assert names == ["b100", "b50", "b25", "lora", "svd-b50", "svd-b25"]
    (train, export), (lora,) = (commands_of(students[i], args) for i in (1, 3))
    assert train[0] == "train b50" and train[1][3:] == [
        "--run", str(tmp_path / "s" / "b50"), "--method", "budgeted", "--budget", "0.5",
        "--tokens", "8192",
    ]  # fmt: skip
    assert export[1][-4:] == ["--precision", "fp32", "int8", "int4"]
    assert lora[1][5:7] == ["--method", "lora"]


def test_every_baseline_takes_the_flags_of_the_students(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path, "--mlp", "pair"))
    for student in students_of(args):
        asked = parse_args(commands_of(student, args)[0][1][3:])
        assert (asked.method, asked.mlp) == (student.method, "pair")


def test_a_finished_student_is_left_alone_and_an_interrupted_one_resumed(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path))
    half = students_of(args)[1]
    half.directory.mkdir(parents=True)
    (half.directory / "request.json").write_text("{}")
    assert commands_of(half, args)[0][1][-1] == "--resume"
    (half.directory / "student").mkdir()
    assert commands_of(half, args)[0][1] == []


class Commands:
    """Stands in for the commands: leaves a student's directory, or fails as told."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.ran = failing, list[list[str]]()

    def __call__(self, command: list[str]) -> int:
        if not command:
            return 0
        self.ran.append(command)
        run = Path(command[command.index("--run") + 1])
        if self.failing and self.failing in f"{command[2]} {run.name}":
            return 2
        if command[2] == "distill":
            (run / "student").mkdir(parents=True)
            training = {"tokens": 8192, "tokens_per_s": 100.0}
            manifest = {"measured": {"training": training}}
            (run / "student" / "manifest.json").write_text(json.dumps(manifest))
        return 0


def test_one_failing_budget_does_not_lose_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands("distill b50")
    monkeypatch.setattr(module, "_run", commands)
    assert sweep(flags(tmp_path), []) == 1
    report = commands.ran[-1]
    assert report[2] == "evaluate"
    runs = [Path(w).name for w in report[report.index("--run") + 1 : report.index("--out")]]
    assert runs == ["b100", "b25", "lora", "svd-b50", "svd-b25"]
    assert not any(c[2] == "export" and c[4].endswith("b50") for c in commands.ran)
    captured = capsys.readouterr()
    assert "failed: b50" in captured.err and "ETA" in captured.err and "svd-b25" in captured.out


def test_a_failed_export_still_leaves_the_student_to_be_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands("export b25")
    monkeypatch.setattr(module, "_run", commands)
    assert sweep(flags(tmp_path), []) == 1
    assert str(tmp_path / "s" / "b25") in commands.ran[-1]


def test_a_second_call_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_run", Commands())
    assert sweep(flags(tmp_path), []) == 0
    again = Commands()
    monkeypatch.setattr(module, "_run", again)
    assert sweep(flags(tmp_path), []) == 0
    assert {command[2] for command in again.ran} == {"export", "evaluate"}
    took = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert "train b50" in took["took"] and took["total_s"] >= 0


def test_an_interrupt_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda command: 130)
    with pytest.raises(KeyboardInterrupt):
        sweep(flags(tmp_path), [])


def test_a_run_of_other_arguments_is_not_mixed_in(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path))
    half = students_of(args)[1]
    half.directory.mkdir(parents=True)
    request = {**request_json(replace(args.distil, budget=0.5)), "device": "cpu"}
    (half.directory / "request.json").write_text(json.dumps(request))
    require_same_request(args)
    (half.directory / "request.json").write_text(json.dumps({**request, "tokens": 4096}))
    with pytest.raises(UserError, match="--tokens 4096, this sweep asks for 8192"):
        sweep(flags(tmp_path), [])
    del request["mlp"]  # from before MLPs were narrowed
    (half.directory / "request.json").write_text(json.dumps(request))
    with pytest.raises(UserError, match="--mlp pair, this sweep asks for narrow"):
        require_same_request(args)


def test_a_flag_that_a_baseline_does_not_use_may_differ(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path))
    for student, allowed in ((students_of(args)[1], False), (students_of(args)[4], True)):
        request = request_json(
            replace(args.distil, budget=student.budget, method=student.method, refit_tokens=512)
        )
        student.directory.mkdir(parents=True)
        (student.directory / "request.json").write_text(json.dumps(request))
        if allowed:
            require_same_request(args)
        else:
            with pytest.raises(UserError, match="--refit-tokens 512"):
                require_same_request(args)
            (student.directory / "request.json").unlink()


def test_what_is_found_done_says_nothing_about_the_speed(tmp_path: Path) -> None:
    args = parse_sweep(flags(tmp_path, "--baselines", "none"))
    clock = module.Clock(args, tmp_path / "sweep.json")
    for student in students_of(args):
        (student.directory / "student").mkdir(parents=True)
        for precision in args.precision:
            (student.directory / "engine-ort" / f"{precision}-cpu").mkdir(parents=True)
        for name, _ in commands_of(student, args):
            clock.timed(name, lambda: 0, is_there=is_there(student, args, name))
    predicted = json.loads((tmp_path / "sweep.json").read_text())["eta"][-1]["predicted_total_s"]
    evaluation = steps_of(args)[-1]
    assert predicted == pytest.approx(evaluation.work * FIRST_GUESS_S["evaluate"], rel=0.05)


def test_the_report_is_estimated_with_all_its_contenders(tmp_path: Path) -> None:
    """Two students with an engine each, LoRA, two SVDs, and the dense original."""
    args = parse_sweep(["--run", str(tmp_path), "--budgets", "0.5,0.25", "--precision", "int8"])
    assert steps_of(args)[-1] == Step("evaluate", "evaluate", 2 * 2 + 1 + 2 + 1)


def test_text_that_no_budget_can_read_is_refused_before_any_begins(tmp_path: Path) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\x00\x01\xff")
    with pytest.raises(UserError, match="is binary"):
        sweep(["--run", str(tmp_path / "runs"), "--data", str(binary)], [])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--teacher", "nosuch' does not exist"), ("--student", "nosuch' does not exist")],
)
def test_a_model_that_no_budget_can_load_is_refused_before_any_begins(
    flag: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        sweep(["--run", str(tmp_path / "runs"), flag, str(tmp_path / "nosuch")], [])
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; needs a folder"):
        sweep(["--run", str(tmp_path / "file")], [])


def test_text_that_nothing_needs_any_more_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = flags(tmp_path, "--data", str(tmp_path / "gone.txt"))
    for student in students_of(parse_sweep(argv)):
        (student.directory / "student").mkdir(parents=True)
    monkeypatch.setattr(module, "_run", lambda command: 0)
    assert sweep(argv, []) == 0


def test_a_resumed_training_does_not_look_fast(tmp_path: Path) -> None:
    clock = module.Clock(parse_sweep(flags(tmp_path)), tmp_path / "sweep.json")
    clock.timed("train b50", lambda: 0, lambda: 600.0)
    assert clock._took["train b50"].work_s == 600.0


def test_nothing_finished_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", lambda command: 2)
    assert sweep(flags(tmp_path), []) == 1


def actual_seconds(step: Step, first: bool, machine: float) -> Took:
    """A machine whose costs are not the guessed ones: slower, with other overheads."""
    if step.kind == "train":
        work_s = machine * 2.8e-3 * step.work
        return Took(work_s + machine * (60 + (110 if first else 0)), work_s)
    each = {"export": 25.0, "evaluate": 45.0}[step.kind]
    return Took(machine * each * step.work, machine * each * step.work)


@pytest.mark.parametrize("machine", [0.3, 1.0, 4.0])
def test_the_eta_is_within_a_quarter_after_the_first_trained_budget(
    tmp_path: Path, machine: float
) -> None:
    args = parse_sweep(["--run", str(tmp_path), "--tokens", "102400"])
    assert args.budgets == BUDGETS
    steps = steps_of(args)
    took: dict[str, Took] = {}
    trained, real_s = 0, 0.0
    predictions = []
    for step in steps:
        predictions.append((trained, real_s + seconds_left(steps, took)))
        trains = step.kind == "train" and step.work > 0
        took[step.name] = actual_seconds(step, trains and trained == 0, machine)
        real_s += took[step.name].seconds
        trained += trains
    errors = [abs(total / real_s - 1) for done, total in predictions if done]
    assert len(errors) > 10 and max(errors) < 0.25, errors


def test_flags_without_effect_are_flags() -> None:
    named = set[str]().union(*WITHOUT_EFFECT.values())
    assert "mlp" in WITHOUT_EFFECT["svd"] & WITHOUT_EFFECT["lora"]
    assert named <= {field.name for field in fields(DistilArgs)}


def test_work_follows_the_flops_of_training() -> None:
    work: Callable[..., float] = training_work
    assert work(1000, 1.0, "lora") == 1000 and work(1000, 1.0, "budgeted") == 0
    assert 0.4 < work(1000, 0.25, "budgeted") / 1000 < 0.65
    assert work(1000, 0.5, "svd") > work(1000, 0.5, "budgeted") > work(1000, 0.25, "budgeted")


def test_a_command_and_nothing_at_all_are_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"import pathlib, sys; pathlib.Path({str(mark)!r}).touch(); sys.exit(3)"
    run: Any = module._run
    assert run([sys.executable, "-c", script]) == 3 and mark.exists()
    assert run([]) == 0
