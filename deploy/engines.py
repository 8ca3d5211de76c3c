"""Which engine directory a command means: named, or the fastest kind of the newest run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from distill.artifact import MANIFEST, UserError
from distill.runs import RUNS, folder_of, no_such_folder
from export.trt_targets import gpu_sm

# Fastest first on the machine each kind is for. A GPU engine of a run comes before a CPU one, but
# TensorRT's, which is also built ahead of time, only where there is a GPU. Of the CPU's, int4 reads
# the fewest bytes a token. Build kits come last: they run nowhere until a device has built their
# engine.
GROUPS = ("engine-trt", "engine-ort", "onnx")
PROVIDERS = ("tensorrt", "cuda", "cpu")
PRECISIONS = {
    "engine-trt": ("int4", "int8", "fp16", "bf16", "fp32"),
    "tensorrt": ("fp16", "bf16", "int8", "int4", "fp32"),
    "cuda": ("fp16", "bf16", "int4", "int8", "fp32"),
    "cpu": ("int4", "int8", "fp32", "fp16", "bf16"),
}
FLAVOURS = ("ort", "standard", "plain")
"""Of an onnx directory; all but the first are written for TensorRT and slower elsewhere."""
WRITE = "write one with: python -m export --engine ort --run"


def find_engine(run: str | None, engine: str | None = None) -> Path:
    """The engine directory that `--run` and `--engine` mean.

    Args:
        run: a run folder, the name of one below ``runs``, or an engine directory itself; None:
            the newest run that holds an engine.
        engine: "engine-ort/int8-cpu", "int8-cpu", or a precision or group; None: the first of
            `engines_of`.
    Raises: UserError naming what is there instead.
    """
    return engines_matching(run, engine)[0]


def engines_matching(run: str | None, engine: str | None = None) -> list[Path]:
    """Every engine that `--run` and `--engine` may mean, never none: what runs here first, then
    what has exactly that name; see `find_engine`."""
    folder = _newest() if run is None else _folder(run)
    if not _is_engine(folder):
        return _matching(folder, engine)
    if engine is not None:
        raise UserError(
            f"--engine {engine}: {folder} is an engine itself; give its run folder as "
            "--run, or leave --engine out"
        )
    return [folder]


def engines_of(run: Path) -> list[Path]:
    """Every finished engine of a run folder, the fastest kind first (see `GROUPS`)."""
    return sorted(_engines(run), key=_rank)


def engine_name(directory: Path) -> str:
    """For example "engine-ort/int8-cpu"; the bare name where its group is not one of ours."""
    directory = Path(directory).absolute()
    group = directory.parent.name
    return f"{group}/{directory.name}" if group in GROUPS else directory.name


def _folder(run: str) -> Path:
    found = folder_of(run)
    if found is None:
        raise UserError(
            f"--run {run}: {no_such_folder(run)}; {_known()}; "
            "name a run folder or an engine directory"
        )
    return found


def _matching(folder: Path, engine: str | None) -> list[Path]:
    engines = engines_of(folder)
    if not engines:
        raise UserError(
            f"{folder} holds no finished engine; needs one; {WRITE} {shlex.quote(str(folder))}"
        )
    if engine is None:
        return engines
    wanted = engine.strip("/")
    matching = [e for e in engines if wanted in (engine_name(e), *engine_name(e).split("/"))]
    matching += [e for e in engines if wanted in e.name.split("-")]
    if matching:
        return sorted(dict.fromkeys(matching), key=_idle)
    names = ", ".join(engine_name(directory) for directory in engines)
    raise UserError(
        f"--engine {engine}: {folder} has no such engine; it has {names}; choose one of these"
    )


def _engines(run: Path) -> Iterator[Path]:
    for group in GROUPS:
        for directory in sorted((run / group).glob("[!.]*")):
            if (directory / MANIFEST).is_file() and _is_engine(directory):
                yield directory


def _is_engine(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("model.onnx", "model.engine"))


def _idle(directory: Path) -> int:
    """0; 1: TensorRT's and no NVIDIA GPU is here; 2: still to be built, on its device."""
    if directory.parent.name != "engine-trt":
        return 0
    if not (directory / "model.engine").is_file():
        return 2
    return int(gpu_sm() is None)


def _rank(directory: Path) -> tuple[int, int, int, int, str]:
    """What cannot run here last; group, provider or flavour, precision."""
    group = directory.parent.name
    words = directory.name.split("-")
    provider = next((p for p in PROVIDERS if p in words), "cpu")
    order = PRECISIONS["engine-trt" if group == "engine-trt" else provider]
    precision = next((i for i, p in enumerate(order) if p in words), len(order))
    flavour = FLAVOURS.index(words[0]) if words[0] in FLAVOURS else 0
    middle = PROVIDERS.index(provider) if group == "engine-ort" else flavour
    return _idle(directory), GROUPS.index(group), middle, precision, directory.name


def _newest() -> Path:
    runs = [run for run in _folders() if engines_of(run)]
    if not runs:
        raise UserError(
            f"no --run was given and no folder below {RUNS.absolute()} holds a finished engine; "
            f"name one with --run DIR; {WRITE} RUN"
        )
    return max(runs, key=lambda run: max(_written_s(engine) for engine in engines_of(run)))


def _written_s(engine: Path) -> float:
    return (engine / MANIFEST).stat().st_mtime


def _folders() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if path.is_dir()) if RUNS.is_dir() else []


def _known() -> str:
    names = [run.name for run in _folders() if engines_of(run)]
    return f"runs with an engine: {', '.join(names)}" if names else "no run holds an engine"
