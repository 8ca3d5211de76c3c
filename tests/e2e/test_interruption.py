"""Ctrl-C and kill -9 at every stage: nothing half-written; --resume ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.faults import (
    INTERRUPTED,
    KILLED,
    REFUSED,
    STEPS,
    Counter,
    Fault,
    assert_refused,
    broken,
    call,
    command,
    file_size_limit,
    finished,
    heed_ctrl_c,
    install,
    leftovers,
    resume,
    start,
    wait_until,
    weights,
)

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_STEPS = 2

WHILE_WORKING = {
    "the text, before it is written": Fault("distill.selftext:_append"),
    "the text, after": Fault("distill.selftext:_append", when="after"),
    "statistics": Fault("distill.factors:_factor", 5),
    "statistics, at the commit": Fault("distill.commit:_replace_directory"),
    "the teacher's pass, rows not yet counted": Fault("distill.teacher_pass:write_json", 2),
    "the refit": Fault("distill.refit:_refit_layer", 2),
    "training, before a checkpoint": Fault("distill.train:_step", 2),
    "training, within a checkpoint": Fault("distill.train:write_json", 2),
    "training, between the renames of a checkpoint": Fault("os:rename", 4),
    "training, after a checkpoint": Fault("distill.train:_step", 6),
    "the merge": Fault("distill.student:_merged", 3),
    "held-out text": Fault("distill.heldout:_window_sums", 2),
    "the student's tensors": Fault("distill.student_format:_write"),
    "the student's manifest": Fault("distill.finish:write_manifest", when="after"),
    "the pictures, the student being in place": Fault("distill.finish:plot_module_map"),
}
SLOW_PASS = ("--micro-batch", "1")
LONG = ("--tokens", "102400", "--fewshot-share", "0.95", "--teacher-pass", "live")
ALLOCATING = ("--allocation", "learned", "--budget", "0.3")


def assert_same_log(run: Path, expected: Path) -> None:
    """Every step once, with the loss of the uninterrupted run."""
    logs = [
        [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]
        for path in (run / "log.jsonl", expected / "log.jsonl")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("stage", WHILE_WORKING)
def test_a_killed_run_resumes_to_the_same_bytes(
    stage: str,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, expected = tmp_path / "run", whole(*SLOW_PASS)
    status = broken(command(teacher, run, *SLOW_PASS), tmp_path / "err", WHILE_WORKING[stage])
    assert status == KILLED, (tmp_path / "err").read_text()
    if "pictures" not in stage:
        assert not (run / "student").exists()
    resume(run, capsys)
    assert weights(run) == weights(expected)
    assert_same_log(run, expected)


@pytest.mark.parametrize("stage", [s for s in WHILE_WORKING if "pictures" not in s])
def test_an_interrupted_run_leaves_nothing_half_written(
    stage: str, teacher: Path, tmp_path: Path
) -> None:
    fault = replace(WHILE_WORKING[stage], strike="interrupt")
    argv = command(teacher, tmp_path / "run", *SLOW_PASS)
    assert broken(argv, tmp_path / "err", fault) == INTERRUPTED
    said = (tmp_path / "err").read_text()
    last = said.splitlines()[-1]
    assert last.startswith("interrupted:") and "Traceback" not in said
    assert last.endswith(f"go on with: python -m distill --resume --run {tmp_path / 'run'}")
    assert not (tmp_path / "run" / "student").exists()
    assert leftovers(tmp_path) == []


def test_a_torn_line_of_text_is_written_anew(
    teacher: Path, whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fault = WHILE_WORKING["the text, after"]
    assert broken(command(teacher, run, *SLOW_PASS), tmp_path / "err", fault) == KILLED
    (text,) = (tmp_path / "cache").glob("text-*.jsonl")
    os.truncate(text, text.stat().st_size - 10)
    resume(run, capsys)
    assert weights(run) == weights(whole(*SLOW_PASS))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("distill.train:_step", 4),
        Fault("distill.train:_step", 8),
        Fault("distill.pipeline:save_student", when="after"),
        Fault("distill.factors:_factor", 25),
    ],
    ids=str,
)
def test_learning_an_allocation_resumes_to_the_same_bytes(
    fault: Fault,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert broken(command(teacher, run, *ALLOCATING), tmp_path / "err", fault) == KILLED
    resume(run, capsys)
    assert weights(run) == weights(whole(*ALLOCATING))
    assert_same_log(run, whole(*ALLOCATING))


@pytest.mark.parametrize("harm", ["damaged", "another version's"])
def test_statistics_of_learned_weights_are_made_anew_where_they_cannot_be_used(
    harm: str,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import distill.factors

    run = tmp_path / "run"
    fault = Fault("distill.refit:_refit_layer")
    assert broken(command(teacher, run, *ALLOCATING), tmp_path / "err", fault) == KILLED
    manifest = run / "allocated-factors" / "manifest.json"
    if harm == "damaged":
        os.truncate(manifest, 100)
    else:
        manifest.write_text(manifest.read_text().replace('"form": "narrow"', '"form": "pair"'))
    factored = Counter()
    monkeypatch.setattr(distill.factors, "_factor", factored.around(distill.factors._factor))
    resume(run, capsys)
    assert factored.calls > 0
    assert weights(run) == weights(whole(*ALLOCATING))


@pytest.mark.parametrize("flags", ["--mlp pair --anneal 0.6", "--method lora", "--optimizer adamw"])
def test_other_ways_of_training_resume_to_the_same_bytes(
    flags: str,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, expected = tmp_path / "run", whole(*flags.split())
    argv = command(teacher, run, *flags.split())
    assert broken(argv, tmp_path / "err", Fault("distill.train:_step", 6)) == KILLED
    resume(run, capsys)
    assert weights(run) == weights(expected)


def test_bfloat16_resumes_to_the_same_bytes(teacher: Path, tmp_path: Path) -> None:
    """In children of their own: accelerate keeps one precision for the life of a process."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "run"
    half = {"dtype": "bfloat16"}
    assert finished(start(command(teacher, whole, **half), tmp_path / "err")) == 0
    assert (
        broken(command(teacher, run, **half), tmp_path / "err", Fault("distill.train:_step", 6))
        == KILLED
    )
    assert finished(start(["--run", str(run), "--resume"], tmp_path / "err")) == 0
    assert weights(run) == weights(whole)
    tensors = load_file(run / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("training, after a checkpoint", STEPS - 4),
        ("training, between the renames of a checkpoint", STEPS - CHECKPOINT_STEPS),
        ("the student's tensors", 0),
    ],
)
def test_resuming_repeats_only_what_no_checkpoint_holds(
    stage: str,
    left: int,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    argv = command(teacher, run, *SLOW_PASS)
    assert broken(argv, tmp_path / "err", WHILE_WORKING[stage]) == KILLED
    steps, factored = Counter(), Counter()
    import distill.factors
    import distill.train

    monkeypatch.setattr(distill.train, "_step", steps.around(distill.train._step))
    monkeypatch.setattr(distill.factors, "_factor", factored.around(distill.factors._factor))
    resume(run, capsys)
    assert (steps.calls, factored.calls) == (left, 0)


def test_overwrite_begins_anew_where_a_checkpoint_was_between_its_names(
    teacher: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    run, other = tmp_path / "run", (*SLOW_PASS, "--learning-rate", "1e-3")
    fault = WHILE_WORKING["training, between the renames of a checkpoint"]
    assert broken(command(teacher, run, *SLOW_PASS), tmp_path / "err", fault) == KILLED
    assert list(run.glob(".checkpoint.replaced-*")) and not (run / "checkpoint").exists()
    argv = command(teacher, run, *other, "--overwrite")
    assert finished(start(argv, tmp_path / "err")) == 0
    assert weights(run) == weights(whole(*other)) != weights(whole(*SLOW_PASS))


def test_the_comparison_notices_another_run(
    teacher: Path, whole: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin: a checkpoint of other steps must not end in the same bytes."""
    run = tmp_path / "run"
    fault = WHILE_WORKING["training, after a checkpoint"]
    assert broken(command(teacher, run, *SLOW_PASS), tmp_path / "err", fault) == KILLED
    state = run / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"step": 4', '"step": 5'))
    resume(run, capsys)
    assert weights(run) != weights(whole(*SLOW_PASS))
    with pytest.raises(AssertionError):
        assert_same_log(run, whole(*SLOW_PASS))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("distill.train:write_json", 4, strike="disk full"),
        Fault("distill.train:_step", 5, strike="disk full"),
        Fault("distill.teacher_pass:write_json", strike="disk full"),
        Fault("distill.finish:write_model_card", strike="disk full"),
    ],
    ids=str,
)
def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(
    fault: Fault,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        install(fault, patch.setattr)
        ended = call(capsys, command(teacher, run, *SLOW_PASS))
    assert_refused(ended, "No space left on device", "--resume")
    assert not (run / "student").exists() and leftovers(tmp_path) == []
    resume(run, capsys)
    assert weights(run) == weights(whole(*SLOW_PASS))


@pytest.mark.parametrize("limit_bytes", [60_000, 150_000, 300_000])
def test_writes_that_really_fail_end_the_run_in_one_line(
    limit_bytes: int,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel refuses to let a file grow: factors, a checkpoint or the student itself."""
    run = tmp_path / "run"
    argv = command(teacher, run, "--teacher-pass", "live", "--budget", "0.6", tokens="512")
    with file_size_limit(limit_bytes):
        ended = call(capsys, argv)
    assert_refused(ended, "--resume")
    assert not (run / "student").exists() and leftovers(tmp_path) == []
    resume(run, capsys)


def test_ctrl_c_and_kill_reach_a_real_process(teacher: Path, tmp_path: Path) -> None:
    """The command itself, from a shell: first Ctrl-C, then kill -9 of its continuation."""
    run = tmp_path / "run"
    argv = command(teacher, run, *LONG)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "distill"]
    first = subprocess.Popen(
        [*line, *argv],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
    )
    log = run / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3)
    first.send_signal(signal.SIGINT)
    said = first.communicate()[1].decode()
    assert first.returncode == INTERRUPTED, said
    assert said.splitlines()[-1].startswith("interrupted:") and "Traceback" not in said
    done = log.read_bytes().count(b"\n")
    second = start(["--run", str(run), "--resume"], tmp_path / "err")
    wait_until(lambda: log.read_bytes().count(b"\n") >= done + 3)
    second.kill()
    assert finished(second) == KILLED
    assert not (run / "student").exists()
    assert (run / "checkpoint" / "state.json").exists()


def test_two_processes_cannot_share_a_run_folder(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    owner = start(command(teacher, run, *LONG), tmp_path / "err")
    try:
        wait_until(lambda: (run / "request.json").exists())
        for argv in (command(teacher, run), ["--run", str(run), "--resume"]):
            assert_refused(call(capsys, argv), str(run), "another process", "--run")
        assert owner.is_alive()
    finally:
        owner.kill()
        finished(owner)
    assert call(capsys, command(teacher, run, "--overwrite", tokens="512")).status != REFUSED
