"""Fixtures of the end-to-end tier: tiny teachers, and one uninterrupted run to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e import faults


@pytest.fixture(autouse=True)
def _brief(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("real") is None:
        faults._measure_briefly(monkeypatch.setattr)


@pytest.fixture(scope="session")
def teacher(tiny_dir: Callable[..., Path]) -> Path:
    """A tiny Llama."""
    return tiny_dir("llama")


@pytest.fixture
def damaged(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may break."""
    return Path(shutil.copytree(teacher, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``whole("--method", "lora")``: the run folder of an uninterrupted run, made once."""
    from distill.__main__ import main

    done: dict[tuple[str, ...], Path] = {}

    def run_of(*flags: str) -> Path:
        if flags not in done:
            run = tmp_path_factory.mktemp("whole") / "run"
            torch.set_num_threads(1)
            assert main(faults.command(teacher, run, *flags)) == 0
            done[flags] = run
        return done[flags]

    return run_of
