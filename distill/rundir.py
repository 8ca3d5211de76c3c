"""The run folder: who owns it, what it holds, and whether the machine can carry the run."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from filelock import BaseFileLock, FileLock, Timeout
from transformers import PreTrainedModel

from distill.args import DistilArgs, request_json
from distill.artifact import (
    UserError,
    open_artifact,
    read_json,
    recover,
    require_disk,
    require_memory,
    write_json,
)
from distill.factors import store_bytes
from distill.hardware import Compute
from distill.refit import refit_width
from distill.teacher import Loaded
from distill.text import RunText

CHECKPOINTS = ("checkpoint", "checkpoint-allocate", "allocated", "allocated-factors")
LOCK = ".lock"
INPUTS = "inputs.json"
WORK = (*CHECKPOINTS, "student", "log.jsonl")
PICTURES = ("training.png", "modules.png")
OUTPUTS = (*WORK, INPUTS, *PICTURES, "student-dense", "tensorboard", "plan.json")
RESOLVED = ("device", "dtype")  # "auto" is recorded as what it came to


@dataclass(frozen=True)
class Run:
    """What the stages of one run share. ``cache`` serves all runs beside this one."""

    args: DistilArgs
    argv: Sequence[str]
    directory: Path
    cache: Path
    accelerator: Accelerator
    compute: Compute
    teacher: Loaded
    student: Loaded
    text: RunText

    @property
    def steps(self) -> int:
        return self.args.tokens // self.args.batch_tokens

    @property
    def keeps_all(self) -> bool:
        """No module is approximated, narrowed or removed: there is nothing to factor."""
        return not self.args.factor_forms

    @property
    def starts_from_teacher(self) -> bool:
        return self.student.fingerprint == self.teacher.fingerprint


def require_unused(args: DistilArgs) -> None:
    """Raise UserError when the folder holds a run's work that the user did not give up.

    A request alone is none: text, statistics and teacher outputs live in the cache.
    """
    directory = args.run_directory
    if any((directory / n).exists() for n in WORK) and not (args.resume or args.overwrite):
        finished = (directory / "student").exists()
        state = "a finished student" if finished else "an interrupted run"
        go_on = "" if finished else f"go on with --resume --run {shlex.quote(str(directory))}; "
        raise UserError(
            f"{directory} already holds {state}; needs an unused folder; "
            f"{go_on}choose another with --run DIR, or replace it with --overwrite"
        )


def how_to_go_on(args: DistilArgs) -> str:
    """What to do after an interruption, for a message."""
    path = args.run_directory / "request.json"
    asked = {k: v for k, v in request_json(args).items() if k not in RESOLVED}
    with suppress(UserError, AttributeError):  # no JSON object
        claimed = path.exists() and asked.items() <= read_json(path).items()
        if claimed and not args.plan_only:
            launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
            python = "the same launcher and" if launched else "python"
            run = shlex.quote(str(args.run_directory))
            return f"go on with: {python} -m distill --resume --run {run}"
    return "give the same command again"


def finished_student(args: DistilArgs) -> Path | None:
    """The student of a run that wrote all it was to write, verified; None: there is more to do."""
    directory = args.run_directory
    artefacts = ["student", *(["student-dense"] if args.dense_copy else [])]
    pictures = PICTURES if (directory / "log.jsonl").exists() else PICTURES[1:]
    if not all((directory / name).exists() for name in (*artefacts, *pictures)):
        return None
    for name in artefacts:
        open_artifact(directory / name, name)
    clear_checkpoints(directory)
    return directory / "student"


def require_same_inputs(args: DistilArgs, inputs: Mapping[str, str]) -> None:
    """A resumed run must find what it began with: ``inputs`` are fingerprints, by name.

    Raises UserError naming what has changed.
    """
    path = args.run_directory / INPUTS
    before = read_json(path) if args.resume and path.exists() else {}
    changed = [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]
    if changed:
        raise UserError(
            f"--resume: the {' and the '.join(changed)} changed since the run in "
            f"{args.run_directory} began; needs what it began with; put that back or start "
            "again with --overwrite"
        )


def note_inputs(args: DistilArgs, inputs: Mapping[str, str], *, more: bool = False) -> None:
    """Record what the run begins with; ``more``: beside what is recorded already."""
    path = args.run_directory / INPUTS
    write_json(path, {**(read_json(path) if more and path.exists() else {}), **inputs})


def claim(args: DistilArgs) -> None:
    """Make the run folder ours: clear it with ``--overwrite`` and note the request."""
    if args.overwrite:
        _clear(args.run_directory)
    write_json(args.run_directory / "request.json", request_json(args))


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """An exclusive hold on the run folder, which is made where it is missing; folders that were
    made for this and got nothing but the lock are taken away again, and so is a lock in a folder
    that is no run's.

    Raises UserError when another process has it or when it cannot be written.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    was_locked_before = (directory / LOCK).exists()
    lock = _locked(directory)
    try:
        yield
    finally:
        with suppress(OSError):
            if not was_locked_before and not (directory / "request.json").exists():
                (directory / LOCK).unlink()
                for path in missing:
                    path.rmdir()
        lock.release()


def _locked(directory: Path) -> BaseFileLock:
    lock = FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{directory} is in use by another process; needs a folder of its own; "
            "wait for that run or choose another with --run DIR"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; needs a writable folder; "
            "choose another with --run DIR"
        ) from None
    return lock


def clear_checkpoints(directory: Path) -> None:
    """Delete what only an interrupted run needs."""
    for name in CHECKPOINTS:
        shutil.rmtree(directory / name, ignore_errors=True)


def require_resources(args: DistilArgs, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Refuse before the work starts when memory or disk cannot hold it; an estimate from above.

    Memory beside the loaded models: a copy to train with gradients and two Adam moments for the
    factored share (all of it where allocations are learned), the dense residual where there is one,
    and the activations of one micro-batch; or the refit's hidden states of teacher and student and
    what one layer's modules read, for all its tokens. Disk: the factors of every calibration
    stage, two checkpoints of parameters and momenta, the student.
    """
    config = student.config
    target = 4 * sum(p.numel() for n, p in student.named_parameters() if ".layers." in n)
    share = 1.0 if args.learns_allocation else min(1.0, args.budget + 0.1)
    residual = target * student.dtype.itemsize / 4 if args.learns_allocation or args.anneal else 0
    trained = 0.0 if args.plan_only else 4 * target * share + residual
    refits = args.method == "budgeted" and not args.anneal and not args.plan_only
    refit_tokens = args.refit_sequences * args.seq_len if refits else 0
    refit = refit_tokens * refit_width(student) * student.dtype.itemsize
    per_token = config.num_hidden_layers * (16 * config.hidden_size + 4 * config.intermediate_size)
    activations = 4 * args.micro_batch * args.seq_len * per_token
    moments = min(args.statistics_memory_gib * 2**30, 8 * target)
    stages = (trained + activations, moments + activations, target * share + refit)
    require_memory(int(max(stages)), "this run")
    disk = sum(store_bytes(student, form) for form in args.factor_forms)
    disk += int(4 * target * share + target)
    require_disk(args.run_directory, disk, "factors, checkpoints and the student")


def _clear(directory: Path) -> None:
    for name in OUTPUTS:
        path = directory / name
        recover(path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
