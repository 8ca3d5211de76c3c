"""Two processes on the CPU compute what one does with the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.artifact import open_artifact
from distill.plan import Plan
from distill.student_format import dense_state, load_student
from tests.e2e.faults import KILLED, Fault, call, command, finished, start

ROOT = Path(__file__).resolve().parents[2]
LOSS_RELATIVE = 1e-4
WEIGHT_ABSOLUTE = 1e-4
LIVE = ("--teacher-pass", "live")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_result(run: Path, expected: Path) -> None:
    """Loss of every step within LOSS_RELATIVE, every weight within WEIGHT_ABSOLUTE; of a pair its
    product, since rounding turns factors of nearly equal energy into one another."""
    assert losses(run) == pytest.approx(losses(expected), rel=LOSS_RELATIVE)
    stored = [set(load_file(r / "student" / "model.safetensors")) for r in (run, expected)]
    assert stored[0] == stored[1]
    found, wanted = (dense_state(load_student(r / "student")) for r in (run, expected))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=WEIGHT_ABSOLUTE)


def run_in_two(
    argv: list[str], directory: Path, fault: Fault | None = None, ranks: Sequence[int] = (0, 1)
) -> list[int]:
    """Exit statuses of two processes of one run; what rank 1 opens goes to ``opened-1``. ``fault``
    strikes those of ``ranks``."""
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        start(
            argv,
            directory / f"err-{rank}",
            environment={**shared, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            opened=directory / f"opened-{rank}",
            fault=fault if rank in ranks else None,
        )
        for rank in range(2)
    ]
    return [finished(process, 120) for process in processes]


@pytest.mark.parametrize(
    "flags",
    [
        "--budget 0.5",
        "--budget 0.08",
        "--allocation spectral+learned --budget 0.4 --hidden-weight 4",
    ],
)
def test_two_processes_equal_one(
    flags: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the lowest budget some trained modules feed only removed ones: they get no gradient."""
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    settings = [*flags.split(), *LIVE]
    assert call(capsys, command(teacher, one, *settings, tokens="1280")).status == 0
    status = run_in_two(command(teacher, two, *settings, tokens="1280"), tmp_path)
    assert status == [0, 0], (tmp_path / "err-0").read_text() + (tmp_path / "err-1").read_text()
    open_artifact(two / "student", "student")
    assert_same_result(two, one)
    main, other = (
        [n for n in (tmp_path / f"opened-{rank}").read_text().splitlines() if str(two.parent) in n]
        for rank in range(2)
    )
    assert other == [] and str(two / "log.jsonl") in main


def test_a_sharded_teacher_gives_the_same_student(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage runs the teacher: its own text, statistics, refit, training, held-out scores."""
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert call(capsys, command(teacher, one, *LIVE, tokens="1280")).status == 0
    argv = command(teacher, two, "--shard-teacher", tokens="1280")
    assert run_in_two(argv, tmp_path) == [0, 0], (tmp_path / "err-0").read_text()
    assert_same_result(two, one)
    found, wanted = (open_artifact(run / "student", "student")["measured"] for run in (two, one))
    assert found["heldout"]["teacher_perplexity"] == pytest.approx(
        wanted["heldout"]["teacher_perplexity"], rel=1e-6
    )
    assert str(two.parent) not in (tmp_path / "opened-1").read_text()
    (file,) = (two.parent / "cache").glob("factors-*/layer-1.safetensors")
    size = file.stat().st_size
    for left in (size // 2, size):  # damaged statistics are made anew by all, sound ones used
        os.truncate(file, left)
        assert run_in_two([*argv, "--overwrite"], tmp_path) == [0, 0]
        assert_same_result(two, one)
        assert file.stat().st_size == size
        assert ("made anew" in (tmp_path / "err-0").read_text()) == (left < size)


def test_it_is_sharded(teacher: Path, tmp_path: Path) -> None:
    """Else the equality above would say nothing."""
    argv = command(teacher, tmp_path / "run", "--shard-teacher")
    assert run_in_two(argv, tmp_path, Fault("distill.opening:shard_layers"))[0] == KILLED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--micro-batch", "2", "--batch-tokens", "384"], "6 sequences a step"),
        (["--method", "lora"], "--method lora exclude"),
    ],
)
def test_what_a_sharded_teacher_cannot_do(
    flags: list[str], said: str, teacher: Path, tmp_path: Path
) -> None:
    argv = [*command(teacher, tmp_path / "run", "--shard-teacher"), *flags]
    assert run_in_two(argv, tmp_path) == [2, 2]
    message = (tmp_path / "err-0").read_text()
    assert message.startswith("error: ") and said in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--data nosuch.txt", "nosuch.txt"),
        ("--teacher nosuch", "nosuch"),
        ("--teacher nosuch --shard-teacher", "nosuch"),
        ("", "finished student"),
    ],
)
def test_what_one_process_refuses_all_refuse(
    mistake: str, said: str, teacher: Path, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    """Else the others wait for one that has given up, and end with a traceback."""
    run = tmp_path / "run" if mistake else whole()
    argv = [*command(teacher, run, tokens="512"), *mistake.split()]
    assert run_in_two(argv, tmp_path) == [2, 2], (tmp_path / "err-1").read_text()
    for rank in range(2):
        printed = (tmp_path / f"err-{rank}").read_text()
        assert printed.count("error:") == 1 and said in printed and "Traceback" not in printed


def test_the_main_process_says_the_precision(teacher: Path, tmp_path: Path) -> None:
    """Near the threshold the two would measure differently: here the other one always would."""
    argv = command(teacher, tmp_path / "run", *LIVE, tokens="512", dtype="auto")
    contrary = Fault("distill.opening:choose_compute")
    assert run_in_two(argv, tmp_path, contrary, ranks=(1,)) == [0, 0]
    assert run_in_two([*argv, "--overwrite"], tmp_path, contrary, ranks=(0,))[0] == KILLED


def test_the_comparison_notices_another_batch(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin: the same text in half the batch."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(capsys, command(teacher, one, *LIVE, tokens="512")).status == 0
    argv = command(teacher, other, *LIVE, "--learning-rate", "9e-4", tokens="512")
    assert call(capsys, argv).status == 0
    assert Plan.load(one / "plan.json").decisions == Plan.load(other / "plan.json").decisions
    with pytest.raises(AssertionError):
        assert_same_result(one, other)


def test_more_processes_than_sequences_are_refused(teacher: Path, tmp_path: Path) -> None:
    argv = command(teacher, tmp_path / "run", tokens="256", batch_tokens="64")
    assert run_in_two(argv, tmp_path) == [2, 2]
    said = (tmp_path / "err-0").read_text()
    assert said.startswith("error: --batch-tokens 64") and "2 processes" in said
    assert "Traceback" not in said + (tmp_path / "err-1").read_text()


def test_torchrun_starts_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert call(capsys, command(teacher, one, *LIVE, tokens="512")).status == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    ended = subprocess.run(
        [*torchrun, *port, "-m", "distill", "--", *command(teacher, two, *LIVE, tokens="512")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_result(two, one)
    assert ended.stdout.count(str(two / "student")) == 1
