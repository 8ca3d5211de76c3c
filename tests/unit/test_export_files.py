"""What lies beside an exported graph: readable by optimum, tokenizers and onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from distill.artifact import UserError, read_json, write_json, write_manifest
from export.files import copy_companions, plain_values, write_genai_config
from tests.parity.lower_cases import save_case, student_model


@pytest.fixture
def student(family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    directory = save_case(tmp_path / "student", student_model(family, "narrow"), tiny_tokenizer)
    write_manifest(
        directory, kind="student", parent=None, argv=[], seed=0, measured={"macs_fraction": 0.5}
    )
    return directory


def copied(student: Path) -> Path:
    directory = student.parent / "onnx"
    directory.mkdir()
    copy_companions(student, directory)
    return directory


def test_companions(student: Path) -> None:
    directory = copied(student)
    names = {path.name for path in directory.iterdir()}
    assert names - {"special_tokens_map.json"} == {  # transformers 4 writes that one too
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "plan.json",
        "student.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert read_json(directory / "student.json") == {"macs_fraction": 0.5}
    for name in ("plan.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (directory / name).read_bytes() == (student / name).read_bytes()


def test_config_is_that_of_the_plain_family(family: str, student: Path) -> None:
    directory = copied(student)
    values = read_json(directory / "config.json")
    assert values["model_type"] == family
    assert values["rope_theta"] > 0
    ours = {"ranks", "widths", "auto_map", "base_model_type"}
    assert ours <= read_json(student / "config.json").keys() and not ours & values.keys()
    assert not any("Budgeted" in name for name in values["architectures"])
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is type(AutoConfig.for_model(family))
    budgeted = AutoConfig.from_pretrained(student)
    for field in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters"):
        assert getattr(config, field, None) == getattr(budgeted, field, None)


def test_tokenizer_says_the_same_and_names_its_outputs(student: Path) -> None:
    directory = copied(student)
    here, there = (AutoTokenizer.from_pretrained(folder) for folder in (directory, student))
    text = "The river rises: 12 + 3 = 15\n"
    assert here(text)["input_ids"] == there(text)["input_ids"]
    assert set(here(text)) == {"input_ids", "attention_mask"}
    chat = [{"role": "user", "content": "open"}]
    assert here.apply_chat_template(chat, tokenize=False) == there.apply_chat_template(
        chat, tokenize=False
    )
    assert read_json(directory / "tokenizer_config.json")["model_input_names"] == [
        "input_ids",
        "attention_mask",
    ]


def test_genai_config(family: str, student: Path) -> None:
    directory = copied(student)
    write_genai_config(directory)
    values = read_json(directory / "genai_config.json")
    model, decoder = values["model"], values["model"]["decoder"]
    vocabulary = read_json(directory / "config.json")["vocab_size"]
    assert (model["type"], model["vocab_size"]) == (family, vocabulary)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    sizes = ("num_attention_heads", "num_key_value_heads", "head_size", "num_hidden_layers")
    assert [decoder[size] for size in sizes] == [4, 2, 16, 3]
    assert decoder["filename"] == "model.onnx"
    assert decoder["inputs"]["past_key_names"] % 2 == "past_key_values.2.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert values["search"]["past_present_share_buffer"] is False
    assert values["search"]["max_length"] == model["context_length"] == 512


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"eos_token_id": [2, 7], "do_sample": True, "top_p": 0.9, "temperature": 0.6},
            {"eos_token_id": [2, 7], "do_sample": True, "top_p": 0.9, "temperature": 0.6},
        ),
        ({"eos_token_id": 3, "pad_token_id": None}, {"eos_token_id": 3, "pad_token_id": 3}),
        ({"eos_token_id": [5, 3], "pad_token_id": None}, {"pad_token_id": 5}),
    ],
)
def test_generation_settings_reach_genai(
    generation: dict[str, Any],
    expected: dict[str, Any],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = student_model("llama", "keep")
    directory = copied(save_case(tmp_path / "student", model, tiny_tokenizer))
    write_json(directory / "generation_config.json", generation)
    write_genai_config(directory)
    values = read_json(directory / "genai_config.json")
    assert expected.items() <= {**values["model"], **values["search"]}.items()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "plan.json"])
def test_a_missing_companion_is_named(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    student = save_case(tmp_path / "student", student_model("llama", "keep"), tiny_tokenizer)
    (student / name).unlink()
    with pytest.raises(UserError, match=name):
        copied(student)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UserError, match="gpt2"):
        plain_values(tmp_path)
