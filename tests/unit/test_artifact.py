"""The artefact contract: whole or absent, and verified when opened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill import artifact, commit
from distill.artifact import UserError, open_artifact, staged, write_manifest

ROOT = Path(__file__).resolve().parents[2]


def make_student(directory: Path, content: str = "weights") -> str:
    with staged(directory) as staging:
        (staging / "model.safetensors").write_text(content)
        (staging / "nested").mkdir()
        (staging / "nested" / "notes.txt").write_text("n")
        return write_manifest(
            staging, kind="student", parent=None, argv=["distill"], seed=7, measured={"kl": 0.5}
        )


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_finished_artefact_opens_and_tells_what_it_holds(tmp_path: Path) -> None:
    sealed = make_student(tmp_path / "student")
    manifest = open_artifact(tmp_path / "student", "student")
    assert sealed == artifact.sha256_file(tmp_path / "student" / "manifest.json")
    assert set(manifest["files"]) == {"model.safetensors", "nested/notes.txt"}
    assert (manifest["seed"], manifest["argv"], manifest["parent"]) == (7, ["distill"], None)
    assert manifest["measured"] == {"kl": 0.5} and manifest["schema"] == artifact.SCHEMA_VERSION
    assert "torch" in manifest["libraries"]
    assert names_in(tmp_path) == ["student"]


def flip_a_byte(directory: Path) -> None:
    (directory / "model.safetensors").write_text("weightz")


def truncate_a_file(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 3)


def delete_a_file(directory: Path) -> None:
    (directory / "nested" / "notes.txt").unlink()


def delete_the_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def truncate_the_manifest(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 40)


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"model\.safetensors differs .*python -m distill"),
        (
            truncate_a_file,
            r"model\.safetensors has 3 bytes, not the 7 .*python -m distill",
        ),
        (delete_a_file, r"notes\.txt is missing.*python -m distill"),
        (delete_the_manifest, r"manifest\.json is missing.*python -m distill"),
        (truncate_the_manifest, r"manifest\.json is truncated"),
        (edit_manifest(schema=99), r"schema 99; this version reads 1"),
        (edit_manifest(kind="onnx"), r"holds a 'onnx'; needs a 'student'"),
        (edit_manifest(kind=None), r"holds a None"),
        (edit_manifest(files=None), r"lists no files"),
        (edit_manifest(files={"../student/model.safetensors": {}}), r"outside its directory"),
        (edit_manifest(files={"/etc/hostname": {}}), r"outside its directory"),
        (edit_manifest(files={"model.safetensors": 7}), r"7 bytes, not the None"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    make_student(tmp_path / "student")
    damage(tmp_path / "student")
    with pytest.raises(UserError, match=message) as caught:
        open_artifact(tmp_path / "student", "student")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "argv", "said"),
    [
        ("engine-ort", ["python", "-m", "export", "--precision", "int4"],
         "copy it again, or .*: python -m export --precision int4 --run {run} --overwrite$"),
        ("engine-ort", ["python", "-m", "export", "--run", "my runs/a"],
         "python -m export --run 'my runs/a' --overwrite$"),
        ("engine-ort", [], "python -m export --run RUN --engine ort$"),
        ("engine-ort", ["curl", "x"], "python -m export --run RUN --engine ort$"),
        ("engine-ort", ["python", "-m", "export", "\nx"], "python -m export --run RUN .*ort$"),
        ("student", ["python", "-m", "distill", "--resume"], "python -m distill --budget F$"),
        ("report", ["python", "-m", "evaluate", "--run", "a"], "python -m evaluate --run a$"),
    ],
)  # fmt: skip
def test_damage_names_the_command_that_made_this_very_artefact(
    kind: str, argv: list[str], said: str, tmp_path: Path
) -> None:
    directory = tmp_path / "group" / "it"
    with staged(directory) as partial:
        (partial / "model.onnx").write_text("weights")
        write_manifest(partial, kind=kind, parent=None, argv=argv, seed=0, measured={})
    (directory / "model.onnx").write_text("weight")
    with pytest.raises(UserError, match=said.format(run=tmp_path)):
        open_artifact(directory, kind)


def test_damage_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run" / "engine-ort" / "int8-cpu"
    with staged(directory) as partial:
        (partial / "model.onnx").write_text("weights")
        argv = ["python", "-m", "export"]
        write_manifest(partial, kind="engine-ort", parent=None, argv=argv, seed=0, measured={})
    (directory / "model.onnx").unlink()
    monkeypatch.chdir(directory.parent)
    with pytest.raises(UserError, match=f"--run {tmp_path / 'run'} --overwrite"):
        open_artifact(Path("int8-cpu"))


def test_a_missing_directory_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist.*python -m export --run RUN --engine trt"):
        open_artifact(tmp_path / "engine-trt")


def test_unlisted_files_are_allowed(tmp_path: Path) -> None:
    make_student(tmp_path / "student")
    (tmp_path / "student" / "extra.txt").write_text("x")
    open_artifact(tmp_path / "student", "student")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_directory(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "student"
    make_student(final, "old")
    with pytest.raises(error), staged(final) as staging:
        (staging / "model.safetensors").write_text("new")
        raise error
    assert (final / "model.safetensors").read_text() == "old"
    assert names_in(tmp_path) == ["student"]


def test_a_new_directory_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    final = tmp_path / "student"
    make_student(final)
    with staged(final) as staging:
        (staging / "only.txt").write_text("new")
    assert names_in(final) == ["only.txt"]
    assert names_in(tmp_path) == ["student"]


def test_a_failing_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "student"
    make_student(final, "old")
    rename = Path.rename

    def fail_for_staging(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_staging)
    with pytest.raises(OSError, match="no rename"):
        make_student(final, "new")
    assert (final / "model.safetensors").read_text() == "old"
    assert names_in(tmp_path) == ["student"]


KILLED = """
import os, signal, sys
from pathlib import Path
from distill import commit
if sys.argv[2] == "between renames":
    rename = Path.rename
    def kill_before_the_second(self, target):
        if ".partial-" in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.rename = kill_before_the_second
with commit.staged(Path(sys.argv[1])) as staging:
    (staging / "model.safetensors").write_text("new")
    if sys.argv[2] == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between renames"])
def test_kill_9_leaves_nothing_that_looks_finished(tmp_path: Path, moment: str) -> None:
    final = tmp_path / "student"
    make_student(final, "old")
    command = [sys.executable, "-c", KILLED, str(final), moment]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2
    commit.recover(final)
    assert names_in(tmp_path) == ["student"]
    open_artifact(final, "student")
    assert (final / "model.safetensors").read_text() == "old"


def test_only_the_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    alive = tmp_path / f".student.partial-{os.getppid()}"
    own = tmp_path / f".student.partial-{os.getpid()}"
    dead = tmp_path / f".student.partial-{dead_pid()}"
    other = tmp_path / f".onnx.partial-{dead_pid()}"
    for path in (alive, own, dead, other):
        path.mkdir()
        (path / "piece").write_text("x")
    make_student(tmp_path / "student")
    assert names_in(tmp_path) == sorted([alive.name, other.name, "student"])
    assert not (tmp_path / "student" / "piece").exists()


def test_a_directory_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="cannot write .*--run"),
        staged(tmp_path / "file" / "student"),
    ):
        pass


def test_json_is_stable_and_atomic(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    value = {"b": np.float32(0.5), "a": [np.int64(3), Path("x"), "é"]}
    artifact.write_json(path, value)
    first = path.read_bytes()
    assert artifact.read_json(path) == {"b": 0.5, "a": [3, "x", "é"]}
    artifact.write_json(path, value)
    assert path.read_bytes() == first and first.endswith(b"}\n")
    for bad in ({"a": float("nan")}, {"a": np.float32("inf")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            artifact.write_json(path, bad)
    assert path.read_bytes() == first
    assert names_in(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_text_that_cannot_be_finished_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.txt"
    artifact.atomic_write_text(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        artifact.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "truncated or damaged at line 1"),
        (b"", "truncated"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "is missing"),
    ],
)
def test_bad_json_is_a_user_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        artifact.read_json(path)


def test_disk_is_checked_before_the_directory_exists(tmp_path: Path) -> None:
    artifact.require_disk(tmp_path / "not" / "yet", 1, "the student")
    with pytest.raises(UserError, match="the student needs .* GiB of disk"):
        artifact.require_disk(tmp_path / "not" / "yet", 2**60, "the student")


def test_memory_is_checked() -> None:
    artifact.require_memory(1, "the plan")
    with pytest.raises(UserError, match="the plan needs .* GiB of memory"):
        artifact.require_memory(2**60, "the plan")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_bounds_memory(tmp_path: Path, version: int) -> None:
    line = "0::/outer/inner\n" if version == 2 else "5:cpu:/\n4:memory:/outer/inner\n"
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    usage = "memory.current" if version == 2 else "memory.usage_in_bytes"
    stat = "inactive_file 30\n" if version == 2 else "inactive_file 1\ntotal_inactive_file 30\n"
    outer = tmp_path / ("outer" if version == 2 else "memory/outer")
    (outer / "inner").mkdir(parents=True)
    (outer / "inner" / limit).write_text("max\n" if version == 2 else f"{2**62}\n")
    (outer / "inner" / usage).write_text("50\n")
    (outer / limit).write_text("1000\n")
    (outer / usage).write_text("600\n")
    (outer / "memory.stat").write_text(stat)
    (tmp_path / "self").write_text(line)
    assert artifact.available_memory_bytes(tmp_path / "self", tmp_path) == 430


def test_without_control_groups_the_machine_bounds_memory(tmp_path: Path) -> None:
    assert artifact.available_memory_bytes(tmp_path / "none", tmp_path) > 2**20
