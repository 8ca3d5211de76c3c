"""onnxruntime-genai runs an exported directory and chooses the tokens that PyTorch chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.teacher import load_teacher
from export.files import copy_companions, write_genai_config
from export.lower import lower, save_onnx
from tests.parity.lower_cases import greedy_tokens, save_case, student_model, truncated_model

genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")

PROMPT = (5, 17, 90, 33, 7, 201, 14)
NEW = 30  # the prompt and these pass the sliding windows of 24


def exported(student: Path, directory: Path) -> Path:
    directory.mkdir()
    save_onnx(lower(student, flavour="ort", precision="fp32"), directory)
    copy_companions(student, directory)
    write_genai_config(directory)
    return directory


def genai_tokens(directory: Path, prompt: tuple[int, ...], new: int) -> list[int]:
    model = genai.Model(str(directory))
    settings = genai.GeneratorParams(model)
    length = len(prompt) + new
    settings.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def test_every_family(family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = student_model(family, "outputs removed")
    student = save_case(tmp_path / "student", model, tiny_tokenizer)
    got = genai_tokens(exported(student, tmp_path / "onnx"), PROMPT, NEW)
    assert got == greedy_tokens(model, PROMPT, NEW)


def test_another_models_tokens_differ(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The twin: a model with one module changed must not pass for the first."""
    model = student_model("llama", "factored")
    student = save_case(tmp_path / "student", model, tiny_tokenizer)
    got = genai_tokens(exported(student, tmp_path / "onnx"), PROMPT, NEW)
    model.model.layers[0].mlp.down_proj.up.weight.data.mul_(1.5)
    assert got != greedy_tokens(model, PROMPT, NEW)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    loaded = load_teacher("smollm2-135m", dtype=torch.float32)
    model: PreTrainedModel = truncated_model(loaded.model)
    student = save_case(tmp_path / "student", model, loaded.tokenizer)
    directory = exported(student, tmp_path / "onnx")
    tokenizer = genai.Tokenizer(genai.Model(str(directory)))
    text = "The capital of France is"
    prompt = tuple(int(token) for token in tokenizer.encode(text))
    assert list(prompt) == loaded.tokenizer(text)["input_ids"]
    assert genai_tokens(directory, prompt, NEW) == greedy_tokens(model, prompt, NEW)
