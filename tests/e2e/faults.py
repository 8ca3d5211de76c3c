"""Runs of ``python -m distill`` on tiny models, and the ways in which a run can be broken.

A child process comes from a fork server that has imported torch once, so that killing one costs a
fraction of a second. A ``Fault`` strikes when the run reaches a given call of a given function:
the moment is exact, and the product needs no hook for it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from distill.artifact import open_artifact, sha256_file

INTERRUPTED = 130
REFUSED = 2
KILLED = -signal.SIGKILL
TINY = {
    "--seq-len": "64",
    "--batch-tokens": "256",
    "--tokens": "2560",
    "--statistics-tokens": "640",
    "--rank-multiple": "8",
    "--checkpoint-steps": "2",
    "--dtype": "float32",
    "--device": "cpu",
}
STEPS = 10


@dataclass(frozen=True)
class Fault:
    """Strike at call number ``call`` of ``where`` ("module:function"), before or after it ran."""

    where: str
    call: int = 1
    when: Literal["before", "after"] = "before"
    strike: Literal["kill", "interrupt", "disk full"] = "kill"

    def __str__(self) -> str:
        return f"{self.when}-{self.where.rpartition(':')[2]}-{self.call}"


@dataclass(frozen=True)
class Ended:
    """What a run in this process left: its exit status and all it printed."""

    status: int
    out: str
    err: str


@dataclass
class Counter:
    """Counts calls of a function that it stands in for."""

    calls: int = 0
    before: Callable[[int], None] | None = None
    after: Callable[[int], None] | None = None
    results: list[Any] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            call = self.calls
            if self.before is not None:
                self.before(call)
            result = function(*args, **kwargs)
            if self.after is not None:
                self.after(call)
            return result

        return counted


def command(teacher: Path, run: Path, *flags: str, **changed: str) -> list[str]:
    """Arguments of a tiny run; ``tokens="512"`` replaces the value of ``--tokens``."""
    settings = {**TINY, **{f"--{k.replace('_', '-')}": v for k, v in changed.items()}}
    pairs = [part for pair in settings.items() for part in pair]
    return ["--teacher", str(teacher), "--run", str(run), *pairs, *flags]


def call(capsys: pytest.CaptureFixture[str], argv: list[str]) -> Ended:
    """Run in this process."""
    from distill.__main__ import main

    capsys.readouterr()
    status = main(argv)
    printed = capsys.readouterr()
    return Ended(status, printed.out, printed.err)


def start(
    argv: list[str],
    err: Path,
    *,
    fault: Fault | None = None,
    environment: Mapping[str, str] | None = None,
    opened: Path | None = None,
) -> multiprocessing.process.BaseProcess:
    """Run in a child process with stderr in the file ``err``.

    ``opened`` receives the path of every file that the child's Python code opens for writing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.pipeline"])
    process = context.Process(
        target=_child, args=(argv, str(err), fault, dict(environment or {}), opened)
    )
    process.start()
    return process


def finished(process: multiprocessing.process.BaseProcess, timeout_s: float = 300) -> int:
    """Exit status of a child, negative where a signal ended it."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the run did not end within {timeout_s} s")
    return process.exitcode


def broken(argv: list[str], err: Path, fault: Fault) -> int:
    """Exit status of a run that ``fault`` strikes."""
    return finished(start(argv, err, fault=fault))


def wait_until(condition: Callable[[], bool], timeout_s: float = 300) -> None:
    """Poll; raises AssertionError when the time is over."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"nothing happened within {timeout_s} s"
        time.sleep(0.02)


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond the limit: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def install(fault: Fault, patch: Callable[[Any, str, Any], None]) -> Counter:
    """Put ``fault`` in place with ``patch(module, name, function)``; returns its counter."""
    counter = Counter()

    def strike(number: int) -> None:
        if number == fault.call:
            _STRIKES[fault.strike]()

    setattr(counter, fault.when, strike)
    module_name, _, name = fault.where.partition(":")
    module = importlib.import_module(module_name)
    patch(module, name, counter.around(getattr(module, name)))
    return counter


def heed_ctrl_c() -> None:
    """A shell lets its background jobs, and all that they start, ignore SIGINT: undo that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Go on with an interrupted run to its end; nothing half-written is left."""
    ended = call(capsys, ["--run", str(run), "--resume"])
    assert ended.status == 0, ended.err
    open_artifact(run / "student", "student")
    assert not leftovers(run)
    assert not (run / "checkpoint").exists()


def weights(run: Path) -> str:
    """sha256 of the student's tensors."""
    return sha256_file(run / "student" / "model.safetensors")


def leftovers(directory: Path) -> list[str]:
    """Half-written files and directories below ``directory``."""
    return sorted(p.name for p in directory.rglob(".*") if "partial" in p.name)


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit status 2 and one clear line, which holds every one of ``words``."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert ended.status == REFUSED, ended.err
    assert len(lines) == 1 and ended.err.rstrip("\n").endswith(lines[0]), ended.err
    assert "Traceback" not in ended.err + ended.out, ended.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _disk_full() -> None:
    raise OSError(28, "No space left on device", "a file of the test")


_STRIKES = {"kill": _kill, "interrupt": _interrupt, "disk full": _disk_full}


def _child(
    argv: list[str], err: str, fault: Fault | None, environment: dict[str, str], opened: Path | None
) -> None:
    with open(err, "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    os.environ.update(environment)
    heed_ctrl_c()
    torch.set_num_threads(1)
    _measure_briefly(setattr)
    if opened is not None:
        _record_writes(opened)
    if fault is not None:
        install(fault, setattr)
    from distill.__main__ import main

    status = main(argv)
    sys.stderr.flush()
    sys.stdout.flush()
    sys.exit(status)


def _measure_briefly(patch: Callable[[Any, str, Any], None]) -> None:
    """The matmul rate only scales a printed figure: measure it on small matrices."""
    import distill.hardware

    patch(distill.hardware, "MATMUL_SIZE", 64)


def _record_writes(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
            if args[2] & (os.O_WRONLY | os.O_RDWR):
                os.write(descriptor, f"{os.path.abspath(args[0])}\n".encode())
        elif event == "os.rename":
            os.write(descriptor, f"{os.path.abspath(args[1])}\n".encode())

    sys.addaudithook(note)
