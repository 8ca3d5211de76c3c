"""Files and directories that appear whole or not at all: written beside, synced, renamed last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class UserError(Exception):
    """The user's mistake in one line: what was received; what is allowed; what to do next."""


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final` that becomes `final` on a clean exit.

    Everything is flushed to disk before the rename. An existing `final` is moved aside and deleted
    only once its successor stands; any exception removes the new directory and leaves the old one.
    Left-overs of killed processes are cleared on entry (see `recover`). One process at a time may
    write one `final`.

    Raises: UserError when the directory cannot be created.
    """
    final = Path(final).absolute()
    staging = _beside(final, "partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        recover(final)
        staging.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write {final}: {error.strerror}; needs a directory that can be created; "
            "choose another with --run DIR"
        ) from error
    try:
        yield staging
        _sync_tree(staging)
        _replace_directory(staging, final)
    finally:
        _delete(staging)


def recover(final: Path) -> None:
    """Clear what killed processes left beside `final`.

    A half-written directory is deleted. A directory that was moved aside is put back when the
    process died before its successor was in place, and deleted otherwise.
    """
    final = Path(final).absolute()
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(partial|replaced)-(\d+)")
    for path in sorted(final.parent.glob(".*")):
        match = pattern.fullmatch(path.name)
        if match is None or _is_another_live_process(int(match[2])):
            continue
        if match[1] == "replaced" and not os.path.lexists(final):
            path.rename(final)
        else:
            _delete(path)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader finds the old content or the new, never a part."""
    path = Path(path).absolute()
    partial = _beside(path, "partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        _delete(partial)
    _sync(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Write JSON atomically: two-space indent, keys in the given order, one final newline.

    NumPy and torch scalars become numbers and paths become strings.
    Raises: ValueError on NaN or infinity; TypeError on anything else that JSON lacks.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_as_json)
    atomic_write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: UserError when it is missing, truncated or not JSON."""
    remedy = "needs a complete JSON file; write it again with the command that made it"
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is truncated or damaged at {where}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text at byte {error.start}; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from error


def _replace_directory(staging: Path, final: Path) -> None:
    """Put `staging` in the place of `final`; the old directory survives a failure."""
    aside = _beside(final, "replaced")
    try:
        if os.path.lexists(final):
            final.rename(aside)
        staging.rename(final)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(final):
            aside.rename(final)
        raise
    _sync(final.parent)
    _delete(aside)


def _beside(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}-{os.getpid()}")


def _is_another_live_process(pid: int) -> bool:
    """Own pids count as dead: a killed container's successor often gets the same one."""
    return pid != os.getpid() and psutil.pid_exists(pid)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON-serialisable")
