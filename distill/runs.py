"""Which run folder a command means: a name below ``runs``, a directory, or the newest run."""

from __future__ import annotations

from pathlib import Path

from distill.artifact import MANIFEST
from distill.commit import UserError

RUNS = Path("runs")


def find_run(run: str | None, holds: str = "student") -> Path:
    """The run folder that ``run`` names; None: the newest below ``runs`` that has ``holds``.

    Args:
        run: a directory, or the name of one below ``runs``.
        holds: a finished artefact that the folder must hold, e.g. "student", or a group of them,
            e.g. "engine-ort".

    Raises: UserError naming what is there instead.
    """
    if run is None:
        return _newest(holds)
    found = folder_of(run)
    if found is None:
        raise UserError(
            f"--run {run}: {no_such_folder(run)}; {_known()}; "
            "write one with: python -m distill --budget F"
        )
    if not _has(found, holds):
        raise UserError(
            f"--run {run}: {found / holds} holds no finished artefact; needs a run folder with a "
            f"{holds}; {_remedy(holds)}"
        )
    return found


def folder_of(run: str) -> Path | None:
    """The directory ``run``, or the one of that name below ``runs``."""
    return next((path for path in (Path(run), RUNS / run) if path.is_dir()), None)


def no_such_folder(run: str) -> str:
    """Where `folder_of` looked, each place once."""
    path = Path(run)
    whole = path.is_absolute() or path.parts[:1] == RUNS.parts
    return "no such folder" if whole else f"no such folder, nor {RUNS / run}"


def _newest(holds: str) -> Path:
    runs = [path for path in _folders() if _has(path, holds)]
    if not runs:
        raise UserError(
            f"no --run was given and no folder below {RUNS.absolute()} holds a finished {holds}; "
            f"name one with --run DIR; {_remedy(holds)}"
        )
    return max(runs, key=lambda path: max(m.stat().st_mtime for m in _manifests(path, holds)))


def _folders() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if path.is_dir()) if RUNS.is_dir() else []


def _has(run: Path, holds: str) -> bool:
    return bool(_manifests(run, holds))


def _manifests(run: Path, holds: str) -> list[Path]:
    """Manifests of the artefact itself, or of each member of its group."""
    return [*(run / holds).glob(MANIFEST), *(run / holds).glob(f"[!.]*/{MANIFEST}")]


def _known() -> str:
    names = [path.name for path in _folders() if _has(path, "student")]
    return f"finished runs: {', '.join(names)}" if names else f"{RUNS} holds no finished run"


def _remedy(holds: str) -> str:
    command = "distill --budget F" if holds == "student" else "export"
    return f"write it with: python -m {command}"
