"""optimum's ORTModelForCausalLM runs an exported directory as it runs its own exports.

optimum needs transformers 4.57, so these tests have an environment of their own:
`make test-optimum`. They lower there too, which proves that older transformers suffices.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distill.artifact import read_json, write_json
from distill.teacher import load_teacher
from export.files import copy_companions
from export.graph_config import read_architecture
from export.lower import Flavour, lower, save_onnx
from tests.parity.lower_cases import greedy_tokens, save_case, student_model, truncated_model

optimum = pytest.importorskip("optimum.onnxruntime", reason="run it with `make test-optimum`")

TEXTS = ("The river rises in the hills", "One boat")
NEW = 30  # the prompt and these pass the sliding windows of 24


def exported(student: Path, directory: Path, flavour: Flavour) -> Path:
    directory.mkdir()
    save_onnx(lower(student, flavour=flavour, precision="fp32"), directory)
    copy_companions(student, directory)
    return directory


def optimum_tokens(directory: Path, texts: tuple[str, ...], new: int) -> torch.Tensor:
    """Greedy tokens of a left-padded batch, the prompt included."""
    model = optimum.ORTModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    batch = tokenizer(list(texts), return_tensors="pt", padding=True)
    return model.generate(
        **batch, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None
    )


def assert_same_tokens(
    got: torch.Tensor, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, new: int
) -> None:
    """Each row of a batch equals what PyTorch makes of that row alone."""
    for row, text in zip(got.tolist(), TEXTS, strict=True):
        expected = greedy_tokens(model, tuple(tokenizer(text)["input_ids"]), new)
        assert row[-len(expected) :] == expected


@pytest.mark.parametrize("flavour", ["ort", "standard"])
def test_every_family(
    family: str, flavour: Flavour, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = student_model(family, "outputs removed")
    student = save_case(tmp_path / "student", model, tiny_tokenizer)
    directory = exported(student, tmp_path / "onnx", flavour)
    assert_same_tokens(optimum_tokens(directory, TEXTS, NEW), model, tiny_tokenizer, NEW)


def test_another_models_tokens_differ(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The twin: a model with one module changed must not pass for the first."""
    model = student_model("llama", "factored")
    student = save_case(tmp_path / "student", model, tiny_tokenizer)
    got = optimum_tokens(exported(student, tmp_path / "onnx", "ort"), TEXTS, NEW)
    model.model.layers[0].mlp.down_proj.up.weight.data.mul_(1.5)
    with pytest.raises(AssertionError):
        assert_same_tokens(got, model, tiny_tokenizer, NEW)


def test_a_student_of_transformers_5_is_lowered_alike(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its config.json names RoPE's bases by layer type, and at top level for readers like these."""
    model = student_model("gemma3_text", "keep", rope_theta=5e5, rope_local_base_freq=2e3)
    student = save_case(tmp_path / "student", model, tiny_tokenizer)
    config = read_json(student / "config.json")
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "sliding_attention": {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]},
    }
    write_json(student / "config.json", config)
    ropes = read_architecture(student).ropes
    for kind, base in (("full_attention", 5e5), ("sliding_attention", 2e3)):
        expected = base ** -(np.arange(0, 16, 2) / 16)
        assert np.allclose(ropes[kind].inv_freq, expected, rtol=1e-5)
    directory = exported(student, tmp_path / "onnx", "ort")
    assert_same_tokens(optimum_tokens(directory, TEXTS, NEW), model, tiny_tokenizer, NEW)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    loaded = load_teacher("smollm2-135m", dtype=torch.float32)
    model = truncated_model(loaded.model)
    student = save_case(tmp_path / "student", model, loaded.tokenizer)
    got = optimum_tokens(exported(student, tmp_path / "onnx", "ort"), TEXTS, NEW)
    assert_same_tokens(got, model, loaded.tokenizer, NEW)
