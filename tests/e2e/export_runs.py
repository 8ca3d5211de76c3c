"""Run folders of a tiny student, and ``python -m export`` as a user or a fault meets it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distill.artifact import MANIFEST, open_artifact, write_manifest
from tests.deploy_engines import tiny_student
from tests.e2e.faults import Ended, Fault, heed_ctrl_c, install
from tests.parity.lower_cases import save_case


def write_student(run: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """run/student as distil leaves it, sealed: modules of every form."""
    student = save_case(run / "student", tiny_student(), tokenizer)
    write_manifest(student, kind="student", parent=None, argv=["test"], seed=0, measured={})
    return run


def reseal(student: Path) -> None:
    """Make the manifest agree with what the files hold now."""
    (student / MANIFEST).unlink()
    write_manifest(student, kind="student", parent=None, argv=["test"], seed=0, measured={})


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> Ended:
    """Run in this process."""
    from export.__main__ import main

    capsys.readouterr()
    status = main(argv)
    printed = capsys.readouterr()
    return Ended(status, printed.out, printed.err)


def start(argv: list[str], err: Path, fault: Fault) -> multiprocessing.process.BaseProcess:
    """Run in a child of a fork server with everything imported; stderr goes to the file ``err``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.pipeline", "export.pipeline"])
    process = context.Process(target=_child, args=(argv, str(err), fault))
    process.start()
    return process


def finished_directories(run: Path) -> set[str]:
    """Names of what looks finished below a run; every one is opened and must be whole."""
    found = set()
    for manifest in run.rglob(MANIFEST):
        if not any(part.startswith(".") for part in manifest.relative_to(run).parts):
            open_artifact(manifest.parent)
            found.add(manifest.parent.relative_to(run).as_posix())
    return found


def _child(argv: list[str], err: str, fault: Fault) -> None:
    with open(err, "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    heed_ctrl_c()
    torch.set_num_threads(1)
    install(fault, setattr)
    from export.__main__ import main

    status = main(argv)
    sys.stderr.flush()
    sys.stdout.flush()
    sys.exit(status)
