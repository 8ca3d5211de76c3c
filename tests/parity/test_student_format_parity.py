"""Saved equals loaded, bit for bit, and the dense copy computes the same function.

Every comparison goes through ``assert_same_logits``; the twins break a model in one place and must
be caught by that same function at the same tolerance.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill.modeling_budgeted import (
    MODEL_CLASSES,
    FactoredLinear,
    RemovedLinear,
    apply_structure,
)
from distill.student_format import load_student, save_dense_copy, save_student
from tests.parity.lower_cases import randomise

EXACT = 0.0
DENSE_COPY_FP32 = 1e-5
RANKS = {
    "model.layers.0.self_attn.q_proj": 8,
    "model.layers.1.self_attn.o_proj": 4,
    "model.layers.1.self_attn.k_proj": 12,
    "model.layers.1.mlp.up_proj": 0,
    "model.layers.2.mlp.gate_proj": 16,
    "model.layers.2.mlp.down_proj": 24,
    "model.layers.2.self_attn.v_proj": 0,
}
NARROW = "model.layers.0.mlp"
WIDTHS = {NARROW: 40}
REMOTE_SCRIPT = """
import sys
sys.modules["distill"] = None
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = load_file("ids.safetensors")["ids"]
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32).eval()
    assert Path(directory).name in type(model).__module__, type(model).__module__
    AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    save_file({"logits": logits, "tokens": tokens}, directory + ".safetensors")
"""


def assert_same_logits(expected_BSV: torch.Tensor, got_BSV: torch.Tensor, limit: float) -> None:
    """Raise AssertionError unless the largest difference is at most ``limit`` x largest logit."""
    assert expected_BSV.shape == got_BSV.shape
    assert torch.isfinite(expected_BSV).all() and torch.isfinite(got_BSV).all()
    error = (expected_BSV - got_BSV).abs().max().item()
    allowed = limit * expected_BSV.abs().max().item()
    assert error <= allowed, f"logits differ by {error:.3g}, allowed {allowed:.3g}"


def logits_of(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_BS).logits.float()


def greedy_without_cache(model: PreTrainedModel, ids_BS: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        next_B1 = logits_of(model, ids_BS)[:, -1].argmax(-1, keepdim=True)
        ids_BS = torch.cat([ids_BS, next_B1], dim=1)
    return ids_BS


@pytest.fixture
def ids_BS() -> torch.Tensor:
    return torch.randint(3, 384, (2, 40), generator=torch.Generator().manual_seed(1))


def budgeted_model(
    tiny_model: Callable[..., PreTrainedModel], family: str, tied: bool
) -> PreTrainedModel:
    """A student in memory: kept, factored, narrow and removed modules, with biases where there are
    any."""
    extra = {} if family == "qwen2" else {"attention_bias": True}
    if family == "llama":
        extra["mlp_bias"] = True
    model = tiny_model(family, tie_word_embeddings=tied, **extra)
    apply_structure(model, RANKS, WIDTHS)
    randomise(model)
    return model


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def student(
    request: pytest.FixtureRequest, family: str, tiny_model: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    return budgeted_model(tiny_model, family, request.param)


@pytest.fixture
def saved(
    student: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    save_student(tmp_path / "student", student, tiny_tokenizer, RANKS, WIDTHS)
    return tmp_path / "student"


def test_loaded_equals_saved(student: PreTrainedModel, saved: Path, ids_BS: torch.Tensor) -> None:
    expected = logits_of(student, ids_BS)
    assert_same_logits(expected, logits_of(load_student(saved, torch.float32), ids_BS), EXACT)
    by_auto_class = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert_same_logits(expected, logits_of(by_auto_class, ids_BS), EXACT)


def test_generation_with_cache_equals_greedy_search(
    student: PreTrainedModel, saved: Path, ids_BS: torch.Tensor
) -> None:
    expected = greedy_without_cache(student, ids_BS, 12)
    loaded = load_student(saved, torch.float32)
    lengths = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    got = loaded.generate(ids_BS, eos_token_id=None, use_cache=True, **lengths)
    assert torch.equal(got, expected)


def test_remote_code_equals_saved(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids_BS: torch.Tensor,
    tmp_path: Path,
) -> None:
    """One process without this package loads every family, each with the code in its directory."""
    students = {}
    for family in MODEL_CLASSES:
        for tied in (True, False):
            directory = tmp_path / f"{family}_{'tied' if tied else 'untied'}"
            students[directory] = budgeted_model(tiny_model, family, tied)
            save_student(directory, students[directory], tiny_tokenizer, RANKS, WIDTHS)
    save_file({"ids": ids_BS}, tmp_path / "ids.safetensors")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE_SCRIPT, *map(str, students)]
    run = subprocess.run(
        command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lengths = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    for directory, student in students.items():
        out = load_file(f"{directory}.safetensors")
        assert_same_logits(logits_of(student, ids_BS), out["logits"], EXACT)
        assert torch.equal(student.generate(ids_BS, **lengths), out["tokens"])


def test_dense_copy_computes_the_same(
    student: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    ids_BS: torch.Tensor,
    tmp_path: Path,
) -> None:
    save_dense_copy(tmp_path / "dense", student, tiny_tokenizer)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(dense).__module__.startswith("transformers.")
    expected = logits_of(student, ids_BS)
    assert_same_logits(expected, logits_of(dense, ids_BS), DENSE_COPY_FP32)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == (
        student.lm_head.weight is student.model.embed_tokens.weight
    )


def test_full_rank_student_equals_dense(
    family: str, tiny_model: Callable[..., PreTrainedModel], ids_BS: torch.Tensor
) -> None:
    dense, factored = tiny_model(family), tiny_model(family)
    name = "model.layers.1.self_attn.o_proj"
    weight_ED = dense.get_submodule(name).weight
    apply_structure(factored, {name: weight_ED.shape[1]})
    left, values, right = torch.linalg.svd(weight_ED.double(), full_matrices=False)
    pair = factored.get_submodule(name)
    pair.up.weight.data.copy_(left * values)
    pair.down.weight.data.copy_(right)
    expected = logits_of(dense, ids_BS)
    assert_same_logits(expected, logits_of(factored, ids_BS), DENSE_COPY_FP32)
    pair.up.weight.data[:, -4:] = 0
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(expected, logits_of(factored, ids_BS), DENSE_COPY_FP32)


def break_factor(model: PreTrainedModel) -> None:
    next(m for m in model.modules() if isinstance(m, FactoredLinear)).down.weight.data.mul_(1.01)


def break_order(model: PreTrainedModel) -> None:
    down_EK = model.get_submodule(f"{NARROW}.down_proj").weight
    down_EK.data.copy_(down_EK.data.roll(1, dims=1))


def break_neuron(model: PreTrainedModel) -> None:
    model.get_submodule(f"{NARROW}.down_proj").weight.data[:, -1] = 0


def break_narrow_bias(model: PreTrainedModel) -> None:
    if not model.config.to_dict().get("mlp_bias"):
        pytest.skip("only Llama's MLPs have biases")
    model.get_submodule(f"{NARROW}.up_proj").bias.data.zero_()


def break_removed_bias(model: PreTrainedModel) -> None:
    if model.config.base_model_type == "mistral":
        pytest.skip("Mistral's Linears have no biases")
    removed = (m for m in model.modules() if isinstance(m, RemovedLinear) and m.bias is not None)
    next(removed).bias.data.zero_()


def break_kept(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.01)


def break_head(model: PreTrainedModel) -> None:
    model.lm_head.weight.data[7].mul_(1.01)


FAULTS = (
    break_factor,
    break_order,
    break_neuron,
    break_narrow_bias,
    break_removed_bias,
    break_kept,
    break_head,
)


@pytest.mark.parametrize("student", [True], ids=["tied"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_twin_broken_model_is_caught(
    student: PreTrainedModel,
    saved: Path,
    ids_BS: torch.Tensor,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    fault: Callable[[PreTrainedModel], None],
) -> None:
    expected = logits_of(student, ids_BS)
    loaded = load_student(saved, torch.float32)
    fault(loaded)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(expected, logits_of(loaded, ids_BS), EXACT)
    save_dense_copy(tmp_path / "dense", loaded, tiny_tokenizer)
    dense = load_student(tmp_path / "dense", torch.float32)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(expected, logits_of(dense, ids_BS), DENSE_COPY_FP32)


@pytest.mark.parametrize("student", [True], ids=["tied"], indirect=True)
@pytest.mark.parametrize("fault", ["tensor", "neurons", "rope"])
def test_twin_broken_files_are_caught(
    student: PreTrainedModel, saved: Path, ids_BS: torch.Tensor, fault: str
) -> None:
    if fault in ("tensor", "neurons"):
        state = load_file(saved / "model.safetensors")
        if fault == "tensor":
            state["model.layers.0.self_attn.q_proj.up.weight"] *= 1.01
        else:
            state[f"{NARROW}.up_proj.weight"] = state[f"{NARROW}.up_proj.weight"].roll(1, dims=0)
        save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    else:
        text = (saved / "config.json").read_text()
        values = json.loads(text)
        text = text.replace(f": {values['rope_theta']}", ": 555.0")
        (saved / "config.json").write_text(text)
    with pytest.raises(AssertionError, match="logits differ"):
        got = logits_of(load_student(saved, torch.float32), ids_BS)
        assert_same_logits(logits_of(student, ids_BS), got, EXACT)
