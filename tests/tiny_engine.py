"""A run folder with a tiny student's graph, as an export leaves it, in about a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.artifact import write_manifest
from export.files import copy_companions
from export.lower import lower, save_onnx
from tests.parity.lower_cases import save_case, student_model

CARD = "---\nbase_model: somebody/tiny\nlicense: mit\ntags:\n- a\n---\n# A student\n"


def write_run(
    run: Path, tokenizer: PreTrainedTokenizerBase, family: str = "llama", **measured: Any
) -> tuple[Path, PreTrainedModel]:
    """Write run/student and run/onnx/ort-fp32; returns the latter and the PyTorch student."""
    model = student_model(family, "factored")
    student = save_case(run / "student", model, tokenizer)
    (student / "README.md").write_text(CARD, encoding="utf-8")
    write_manifest(student, kind="student", parent=None, argv=[], seed=0, measured={})
    engine = run / "onnx" / "ort-fp32"
    engine.mkdir(parents=True)
    save_onnx(lower(student, flavour="ort", precision="fp32"), engine)
    copy_companions(student, engine)
    measured = {"flavour": "ort", "precision": "fp32", **measured}
    write_manifest(engine, kind="onnx", parent=None, argv=[], seed=0, measured=measured)
    return engine, model
