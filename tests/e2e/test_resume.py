"""What --resume does with a run that is finished, changed or shared, and what is advised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.args import parse_args
from distill.artifact import UserError, open_artifact
from distill.processes import sole_maker
from tests.e2e.faults import (
    INTERRUPTED,
    KILLED,
    Fault,
    assert_refused,
    broken,
    call,
    command,
    finished,
    resume,
    start,
    wait_until,
    weights,
)


@pytest.mark.parametrize("shared", ["text-*.jsonl", "factors-*", "teacher-*"])
def test_a_second_run_waits_for_what_both_share(
    shared: str, teacher: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Else it would cut the text and the teacher's outputs short that another one reads."""
    run, err = tmp_path / "run", tmp_path / "err"
    (name,) = (path.name for path in (whole().parent / "cache").glob(shared))
    with sole_maker(tmp_path / "cache" / name):
        waiting = start(command(teacher, run), err)
        said = f"makes {tmp_path / 'cache' / name}"
        wait_until(lambda: not waiting.is_alive() or (err.exists() and said in err.read_text()))
        assert waiting.is_alive() and not (tmp_path / "cache" / name).exists()
    assert finished(waiting) == 0, err.read_text()
    assert weights(run) == weights(whole())


def test_a_finished_run_is_left_as_it_is(
    teacher: Path, whole: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole()
    before = {p: p.read_bytes() for p in (run / "log.jsonl", run / "student" / "manifest.json")}
    ended = call(capsys, ["--run", str(run), "--resume"])
    assert ended.status == 0 and "nothing to resume" in ended.out
    assert {p: p.read_bytes() for p in before} == before
    planned = call(capsys, command(teacher, run, "--plan-only", budget="0.5"))
    assert planned.status == 0 and "is left as" in planned.out, planned.err
    assert json.loads((run / "plan.json").read_text())["budget"] == 0.25


@pytest.mark.parametrize("changed", ["text", "teacher"])
def test_a_run_does_not_go_on_with_other_inputs(
    changed: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, text, run = tmp_path / "teacher", tmp_path / "text.txt", tmp_path / "run"
    shutil.copytree(teacher, mine)
    text.write_text("".join(f"Line {n} says {7 * n}.\n" for n in range(600)))
    argv = command(mine, run, "--data", str(text))
    assert broken(argv, tmp_path / "err", Fault("distill.train:_step", 6)) == KILLED
    if changed == "text":
        text.write_text(text.read_text().replace("says", "has"))
    else:
        config = json.loads((mine / "config.json").read_text())
        (mine / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    refused = call(capsys, ["--run", str(run), "--resume"])
    assert_refused(refused, changed, "changed since the run", "--overwrite")
    assert "writes text" not in refused.err
    assert (run / "checkpoint").exists() and not (run / "student").exists()


def test_a_run_does_not_go_on_with_other_neurons(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the cache was deleted and made anew on another machine."""
    run = tmp_path / "run"
    argv = command(teacher, run)
    assert broken(argv, tmp_path / "err", Fault("distill.train:_step", 6)) == KILLED
    noted = json.loads((run / "inputs.json").read_text())
    assert noted.keys() == {"teacher", "student", "text", "plan"}
    (run / "inputs.json").write_text(json.dumps({**noted, "plan": "another"}))
    refused = call(capsys, ["--run", str(run), "--resume"])
    assert_refused(refused, "the plan changed since the run", "--overwrite")
    (run / "inputs.json").write_text(json.dumps(noted))
    assert call(capsys, ["--run", str(run), "--resume"]).status == 0


def test_a_run_from_before_mlps_were_narrowed_is_one_of_pairs(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole("--mlp", "pair"), run)
    request = json.loads((run / "request.json").read_text())
    assert request.pop("mlp") == "pair"
    (run / "request.json").write_text(json.dumps(request))
    assert parse_args(["--run", str(run), "--resume"]).mlp == "pair"
    (run / "request.json").write_text(json.dumps(request | {"factors": "interpolative"}))
    with pytest.raises(UserError, match="factors.*--overwrite"):
        parse_args(["--run", str(run), "--resume"])


def test_advice_is_to_resume_only_what_was_begun(
    teacher: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """With --overwrite the old request stands until the new run claims the folder."""
    run = Path(shutil.copytree(whole(), tmp_path / "run"))
    argv = command(teacher, run, "--overwrite", budget="0.5")
    fault = Fault("distill.opening:load_teacher", strike="interrupt")
    assert broken(argv, tmp_path / "err", fault) == INTERRUPTED
    assert (tmp_path / "err").read_text().rstrip().endswith("give the same command again")
    open_artifact(run / "student", "student")


def test_a_run_killed_while_it_cleans_up_is_finished(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fault = Fault("distill.pipeline:clear_checkpoints")
    assert broken(command(teacher, run), tmp_path / "err", fault) == KILLED
    (run / "checkpoint" / "parameters.safetensors").unlink()
    resume(run, capsys)
