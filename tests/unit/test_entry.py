"""Where a package is missing the commands say so in one line; our own mistakes are not hidden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill import __version__
from distill.entry import start

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("package", ["distill", "export", "evaluate", "deploy"])
def test_nothing_is_installed(package: str) -> None:
    """-S leaves site-packages out."""
    argv = [sys.executable, "-S", "-m", package, "generate"]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: the package ") and "make install" in ended.stderr


@pytest.mark.parametrize("package", ["distill", "export", "evaluate", "deploy"])
def test_the_version_is_told_without_any_package(package: str) -> None:
    for words in (["--version"], ["sub", "--version"]):
        argv = [sys.executable, "-S", "-m", package, *words]
        ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0 and ended.stdout == f"budgeted-lora {__version__}\n"


def test_a_module_of_our_own_that_is_missing_is_a_defect() -> None:
    def main(argv: object) -> int:
        raise ModuleNotFoundError("no", name="distill.gone")

    with pytest.raises(ModuleNotFoundError):
        start(main)
