"""The real built-in model on a few thousand tokens."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from distill.artifact import open_artifact
from distill.student_format import count_macs, load_student
from tests.e2e.faults import call

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--budget 0.5 --tokens 4096 --batch-tokens 2048 --seq-len 256 --statistics-tokens 2048 "
    "--refit-tokens 2048 "
    "--dtype float32 --device cpu"
).split()
WORST_RATIO = 12  # a student whose factors are wrong is off by thousands


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_at_half_its_compute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this repository's own pages, so that it needs no file from elsewhere."""
    text = tmp_path / "pages.txt"
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text.write_text("\n\n".join(page.read_text() for page in pages))
    ended = call(capsys, [*SETTINGS, "--data", str(text), "--run", str(tmp_path / "run")])
    assert ended.status == 0, ended.err
    student = tmp_path / "run" / "student"
    scores = open_artifact(student, "student")["measured"]["heldout"]
    assert 1 < scores["student_perplexity"] / scores["teacher_perplexity"] < WORST_RATIO
    dense = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert count_macs(student).target <= Fraction("0.5") * dense
    model, tokenizer = load_student(student, torch.float32), AutoTokenizer.from_pretrained(student)
    prompt = tokenizer("The president said", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(written[0, -8:]).strip()
