"""Lowering refuses a student whose tensors, config and plan do not fit together."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from distill.artifact import UserError, read_json, write_json
from distill.plan import Plan
from export.lower import lower, save_onnx
from export.weights import Weights
from tests.parity.lower_cases import RANK, Cases


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    return Cases(tmp_path_factory, tiny_tokenizer).directory


@pytest.fixture
def broken(student: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a factored llama that a test may damage."""
    return Path(shutil.copytree(student("llama", "factored"), tmp_path / "broken"))


def refuses(directory: Path, *words: str, precision: Any = "fp32") -> None:
    with pytest.raises(UserError) as refused:
        save_onnx(lower(directory, flavour="ort", precision=precision), directory)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_tensor(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.up.weight"]
    save_file(tensors, broken / "model.safetensors")
    refuses(broken, "model.layers.2.mlp.down_proj", "distil it again")


def test_a_missing_norm(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    refuses(broken, "lacks the tensor model.norm.weight")


@pytest.mark.parametrize("kept_bytes", [0, 5, 500, -100])
def test_a_truncated_checkpoint(kept_bytes: int, broken: Path) -> None:
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: kept_bytes % len(whole)])
    refuses(broken, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'],
)
def test_a_damaged_header(header: bytes, broken: Path) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(64)
    (broken / "model.safetensors").write_bytes(data)
    refuses(broken, "model.safetensors", "damaged")


def test_an_integer_tensor(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int64)
    save_file(tensors, broken / "model.safetensors")
    refuses(broken, "model.norm.weight", "I64")


def test_a_missing_checkpoint(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refuses(broken, "model.safetensors", "missing")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "", 3])
def test_shards_outside_the_directory(shard: object, broken: Path) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(broken, "index.json", "names no shards beside it")


def test_shards_are_read(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    whole = Weights.open(broken)
    expected = {name: whole.array(name).copy() for name in whole.names}
    file_of = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name].bfloat16() for name in part}, broken / file)
        file_of |= dict.fromkeys(part, file)
    (broken / "model.safetensors").unlink()
    write_json(broken / "model.safetensors.index.json", {"weight_map": file_of})
    weights = Weights.open(broken)
    assert weights.names == sorted(expected)
    for name, array in expected.items():
        assert np.array_equal(weights.array(name), array.astype(ml_dtypes.bfloat16))
    file_of["model.layers.9.weight"] = "model-0.safetensors"
    write_json(broken / "model.safetensors.index.json", {"weight_map": file_of})
    refuses(broken, "model.layers.9.weight")


def change_config(directory: Path, **values: Any) -> None:
    config = read_json(directory / "config.json")
    write_json(directory / "config.json", {**config, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2", "base_model_type": "gpt2"}, ("gpt2",)),
        ({"base_model_type": "unheard_of"}, ("unheard_of",)),
        ({"num_attention_heads": "many"}, ("config.json",)),
        ({"hidden_act": "relu6"}, ("relu6", "silu")),
        ({"num_hidden_layers": 4}, ("model.layers.3",)),
        ({"num_attention_heads": 8}, ("q_proj", "128")),
        ({"vocab_size": 385}, ("embed_tokens", "385")),
        ({"tie_word_embeddings": False}, ("lm_head.weight",)),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            },
            ("dynamic", "llama3"),
        ),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(
    values: dict[str, Any], words: tuple[str, ...], broken: Path
) -> None:
    change_config(broken, **values)
    refuses(broken, *words)


def test_a_damaged_config(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": ')
    refuses(broken, "config.json", "truncated")
    (broken / "config.json").unlink()
    refuses(broken, "config.json", "missing")


def test_a_plan_that_does_not_match_the_tensors(broken: Path, student: Callable[..., Path]) -> None:
    plan = Plan.load(broken / "plan.json")
    first = replace(plan.decisions[0], rank=RANK + 1)
    replace(plan, decisions=(first, *plan.decisions[1:])).save(broken / "plan.json")
    refuses(broken, first.module, "plan.json says approximate")
    shutil.copyfile(student("llama", "keep") / "plan.json", broken / "plan.json")
    refuses(broken, "plan.json says keep", "down.weight")
    (broken / "plan.json").unlink()
    refuses(broken, "plan.json", "missing")


GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def with_decision(student: Path, directory: Path, module: str, changes: dict[str, Any]) -> Path:
    """A copy of a student whose plan says something else about one module."""
    shutil.copytree(student, directory)
    plan = Plan.load(directory / "plan.json")
    changed = tuple(replace(d, **changes) if d.module == module else d for d in plan.decisions)
    replace(plan, decisions=changed).save(directory / "plan.json")
    return directory


@pytest.mark.parametrize("module", [GATE, UP, DOWN])
@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 95},
        {"rank": 0},
        {"rank": 128},
        {"rank": "96"},
        {"action": "keep"},
        {"action": "approximate"},
        {"action": "remove"},
    ],
    ids=str,
)
def test_a_width_that_differs_from_the_tensors(
    changes: dict[str, Any], module: str, student: Callable[..., Path], tmp_path: Path
) -> None:
    directory = with_decision(student("llama", "narrow"), tmp_path / "s", module, changes)
    refuses(directory, f"of {module}, but its tensors are", "distil it again")


@pytest.mark.parametrize("module", [GATE, UP, DOWN])
def test_a_dense_mlp_that_the_plan_narrows(
    module: str, student: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"action": "narrow", "rank": 96}
    directory = with_decision(student("llama", "keep"), tmp_path / "s", module, changes)
    narrow, dense = ("[64, 96]", "[64, 128]") if module == DOWN else ("[96, 64]", "[128, 64]")
    refuses(directory, f"plan.json says narrow (rank 96) of {module}", narrow, dense)


@pytest.mark.parametrize(
    ("module", "width", "listed"),
    [
        (GATE, 95, "narrow (rank 95), narrow (rank 96), narrow (rank 96)"),
        (UP, 40, "narrow (rank 96), narrow (rank 40), narrow (rank 96)"),
        (DOWN, 64, "narrow (rank 96), narrow (rank 96), narrow (rank 64)"),
        (DOWN, None, "narrow (rank 96), narrow (rank 96), keep (rank 64)"),
    ],
)
def test_widths_that_differ_within_an_mlp(
    module: str, width: int | None, listed: str, student: Callable[..., Path], tmp_path: Path
) -> None:
    """Each matrix is what the plan says of it, but one does not fit the others."""
    changes = {"action": "narrow", "rank": width} if width else {"action": "keep", "rank": 64}
    directory = with_decision(student("llama", "narrow"), tmp_path / "s", module, changes)
    tensors = load_file(directory / "model.safetensors")
    neurons = width or 128
    shape = (64, neurons) if module == DOWN else (neurons, 64)
    tensors[f"{module}.weight"] = torch.zeros(shape)
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, "model.layers.0.mlp", listed, "all or none", "distil it again")


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_narrow_module_outside_an_mlp(
    name: str, student: Callable[..., Path], tmp_path: Path
) -> None:
    module = f"model.layers.0.self_attn.{name}"
    changes = {"action": "narrow", "rank": 32}
    directory = with_decision(student("llama", "keep"), tmp_path / "s", module, changes)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"][:32].contiguous()
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, module, "is in no MLP", "distil it again")


@pytest.mark.parametrize("module", [GATE, DOWN])
def test_a_bias_of_another_size(module: str, student: Callable[..., Path], tmp_path: Path) -> None:
    source = student("llama", "narrow", biased=True)
    directory = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{module}.bias"] = torch.zeros(128)
    save_file(tensors, directory / "model.safetensors")
    refuses(directory, f"{module}.bias [128]", "distil it again")


def test_a_weight_that_does_not_fit_half_precision(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.down.weight"][3, 4] = 70000.0
    save_file(tensors, broken / "model.safetensors")
    refuses(broken, "up_proj.down.weight", "65504", "--precision bf16", precision="fp16")
    save_onnx(lower(broken, flavour="standard", precision="bf16"), broken)
