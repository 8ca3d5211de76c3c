"""A whole run under the oldest supported transformers, 4.57: text, plan, refit, training, merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from distill.artifact import open_artifact
from distill.student_format import load_student
from tests.e2e.faults import call, command

pytest.importorskip("optimum.onnxruntime", reason="run it with `make test-optimum`")


@pytest.mark.parametrize("flags", ["", "--mlp pair", "--allocation learned"])
def test_a_run_of_every_family(
    family: str,
    flags: str,
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert transformers.__version__.startswith("4.57")
    run = tmp_path / "run"
    ended = call(capsys, command(tiny_dir(family), run, *flags.split(), tokens="1024"))
    assert ended.status == 0, ended.err
    measured = open_artifact(run / "student", "student")["measured"]
    assert measured["macs_fraction"] <= 0.25
    ours = load_student(run / "student", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        run / "student", trust_remote_code=True, dtype=torch.float32
    )
    ids_BT = torch.arange(5, 21)[None]
    torch.testing.assert_close(theirs(ids_BT).logits, ours(ids_BT).logits, rtol=0, atol=0)
