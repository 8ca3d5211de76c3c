"""The real built-in model on a few thousand tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from distill.artifact import open_artifact
from distill.student_format import count_macs, load_student
from tests.e2e.faults import call

SETTINGS = (
    "--budget 0.5 --tokens 4096 --batch-tokens 2048 --seq-len 256 --statistics-tokens 2048 "
    "--dtype float32 --device cpu"
).split()
UNCORRECTED = ("--correction-tokens", "0")


@pytest.mark.real
@pytest.mark.slow
def test_input_correction_helps_the_real_model(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SETTINGS, "--data", str(data_dir / "state-of-the-union.txt")]
    for name, flags in {"corrected": (), "uncorrected": UNCORRECTED}.items():
        ended = call(capsys, [*argv, "--run", str(tmp_path / name), *flags])
        assert ended.status == 0, ended.err
    scores = {
        name: open_artifact(tmp_path / name / "student", "student")["measured"]["heldout"]
        for name in ("corrected", "uncorrected")
    }
    corrected, without = (scores[n]["student_perplexity"] for n in ("corrected", "uncorrected"))
    assert math.isfinite(corrected) and scores["corrected"]["teacher_perplexity"] < corrected
    assert corrected < 0.9 * without
    student = tmp_path / "corrected" / "student"
    dense = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert count_macs(student).target <= Fraction("0.5") * dense
    model, tokenizer = load_student(student, torch.float32), AutoTokenizer.from_pretrained(student)
    prompt = tokenizer("The president said", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(written[0, -8:]).strip()
