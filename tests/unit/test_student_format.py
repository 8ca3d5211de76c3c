"""What a student directory holds, what it costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill import modeling_budgeted
from distill.artifact import UserError
from distill.modeling_budgeted import (
    PROJECTIONS,
    FactoredLinear,
    RemovedLinear,
    apply_structure,
)
from distill.student_format import (
    Macs,
    count_macs,
    dense_macs_from_config,
    dense_state,
    load_student,
    save_dense_copy,
    save_student,
)

Q0, V0, UP1 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
)
MLP2 = "model.layers.2.mlp"
RANKS = {Q0: 8, V0: 4, UP1: 0}
WIDTHS = {MLP2: 40}
HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY, LAYERS = 64, 32, 128, 384, 3
DENSE_TARGET = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INTERMEDIATE)
SAVED_MACS = (
    (HIDDEN * HIDDEN - 8 * (HIDDEN + HIDDEN))
    + (HIDDEN * KEY_VALUE - 4 * (HIDDEN + KEY_VALUE))
    + HIDDEN * INTERMEDIATE
    + 3 * HIDDEN * (INTERMEDIATE - 40)
)
NORMS = (2 * LAYERS + 1) * HIDDEN

Model = Callable[..., PreTrainedModel]


@pytest.fixture
def write(tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """``write(ranks, widths, max_shard_size=..., **config)`` -> (model in memory, directory)."""

    def write_student(ranks=RANKS, widths=WIDTHS, *, max_shard_size="5GB", **overrides):
        model = tiny_model("llama", **overrides)
        apply_structure(model, ranks, widths)
        directory = tmp_path / "student"
        save_student(directory, model, tiny_tokenizer, ranks, widths, max_shard_size=max_shard_size)
        return model, directory

    return write_student


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_factored_and_removed_linear_outputs() -> None:
    x_BSD = torch.randn(2, 5, 6)
    pair = FactoredLinear(6, 7, 3, bias=True)
    expected = x_BSD @ (pair.up.weight @ pair.down.weight).T + pair.up.bias
    torch.testing.assert_close(pair(x_BSD), expected, rtol=0, atol=1e-5)
    assert pair.rank == 3 and pair.down.bias is None
    with_bias, without = RemovedLinear(6, 7, bias=True), RemovedLinear(6, 7)
    with_bias.bias.data.fill_(2.0)
    assert torch.equal(with_bias(x_BSD), torch.full((2, 5, 7), 2.0))
    assert torch.equal(without(x_BSD), torch.zeros(2, 5, 7)) and without.bias is None


def test_apply_structure_keeps_bias_dtype_and_the_rest(tiny_model: Model) -> None:
    model = tiny_model("qwen2").to(torch.float64)
    biases = [model.get_submodule(name).bias.clone() for name in (Q0, V0)]
    apply_structure(model, {Q0: 8, V0: 0})
    assert torch.equal(model.get_submodule(Q0).up.bias, biases[0])
    assert torch.equal(model.get_submodule(V0).bias, biases[1])
    assert model.get_submodule(Q0).down.weight.dtype == torch.float64
    assert isinstance(model.model.layers[1].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize(
    "ranks", [{Q0: 8, "model.layers.9.mlp.up_proj": 4}, {"model.norm": 2}, {Q0: -1}, {Q0: 2.0}]
)
def test_apply_structure_refuses_and_changes_nothing(tiny_model: Model, ranks: dict) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"layers|norm"):
        apply_structure(model, ranks)
    assert not any(isinstance(m, FactoredLinear | RemovedLinear) for m in model.modules())


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_apply_structure_narrows_an_mlp_and_leaves_the_others(
    tiny_model: Model, mlp_bias: bool
) -> None:
    model = tiny_model("llama", mlp_bias=mlp_bias).to(torch.float64).train()
    apply_structure(model, {}, WIDTHS)
    for leaf in PROJECTIONS:
        narrow, reads = getattr(model.get_submodule(MLP2), leaf), leaf == "down_proj"
        assert type(narrow) is nn.Linear and narrow.weight.dtype == torch.float64
        assert narrow.weight.shape == ((HIDDEN, 40) if reads else (40, HIDDEN)) and narrow.training
        if mlp_bias:
            assert narrow.bias.shape == narrow.weight.shape[:1]
            assert narrow.bias.dtype == torch.float64
        else:
            assert narrow.bias is None
    assert model.model.layers[1].mlp.down_proj.in_features == INTERMEDIATE
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize(
    ("ranks", "widths", "message"),
    [
        ({}, {"model.layers.9.mlp": 8}, "'model.layers.9.mlp', which is no MLP"),
        ({}, {"model.layers.0.self_attn": 8}, "self_attn', which is no MLP"),
        ({}, {UP1: 8}, "which is no MLP of three dense projections"),
        ({UP1: 8}, {"model.layers.1.mlp": 8}, "layers.1.mlp', which is no MLP"),
        ({UP1: 0}, {"model.layers.1.mlp": 8}, "layers.1.mlp', which is no MLP"),
        *(
            ({Q0: 8}, {MLP2: width}, f"width of {MLP2} is {width!r}; .* at least 1 and below 128")
            for width in (0, -1, 128, 129, 40.0, "40", True)
        ),
    ],
)
def test_apply_structure_refuses_widths_and_changes_nothing(
    tiny_model: Model, ranks: dict, widths: dict, message: str
) -> None:
    model = tiny_model("llama")
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_structure(model, ranks, widths)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_directory_holds_what_readers_need(write) -> None:
    _, directory = write(rope_theta=77777.0)
    config = json.loads((directory / "config.json").read_text())
    assert config["ranks"] == RANKS and config["widths"] == WIDTHS
    assert (config["base_model_type"], config["intermediate_size"]) == ("llama", INTERMEDIATE)
    assert config["architectures"] == ["BudgetedLlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_budgeted.BudgetedLlamaConfig",
        "AutoModelForCausalLM": "modeling_budgeted.BudgetedLlamaForCausalLM",
    }
    assert config["rope_theta"] == 77777.0
    source = Path(modeling_budgeted.__file__).read_bytes()
    assert (directory / "modeling_budgeted.py").read_bytes() == source
    names = set(load_file(directory / "model.safetensors"))
    assert {f"{Q0}.down.weight", f"{Q0}.up.weight"} <= names
    assert not any(name.startswith(UP1) for name in names)
    assert (directory / "generation_config.json").exists()


def test_factored_bias_is_stored_on_up(tiny_model: Model, tiny_tokenizer, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    apply_structure(model, {Q0: 8, V0: 0})
    save_student(tmp_path / "student", model, tiny_tokenizer, {Q0: 8, V0: 0})
    names = {n for n in load_file(tmp_path / "student" / "model.safetensors") if "layers.0." in n}
    of_modules = {n for n in names if n.startswith((Q0, V0))}
    parts = [f"{Q0}.down.weight", f"{Q0}.up.weight", f"{Q0}.up.bias", f"{V0}.bias"]
    assert of_modules == set(parts)


def test_without_structure_the_plain_architecture_is_written(write) -> None:
    model, directory = write({}, {})
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "ranks", "widths", "base_model_type"} & config.keys()
    assert not list(directory.glob("*.py"))
    loaded = load_student(directory)
    assert type(loaded) is LlamaForCausalLM
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_widths_alone_make_a_budgeted_student(write) -> None:
    model, directory = write({})
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["ranks"]) == ("budgeted_llama", {})
    shapes = {n: t.shape for n, t in load_file(directory / "model.safetensors").items()}
    assert shapes[f"{MLP2}.gate_proj.weight"] == shapes[f"{MLP2}.up_proj.weight"] == (40, HIDDEN)
    assert shapes[f"{MLP2}.down_proj.weight"] == (HIDDEN, 40)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_student(directory)(ids).logits, model(ids).logits)


def test_a_width_that_the_tensors_do_not_have_is_one_clear_line(write) -> None:
    _, directory = write({})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"widths": {MLP2: 48}}))
    with pytest.raises(UserError, match="other shapes than its config.json says; distil it again"):
        load_student(directory)


def test_resaved_student_is_again_complete(write, tmp_path: Path) -> None:
    _, directory = write()
    load_student(directory).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_budgeted.py").exists()
    assert count_macs(tmp_path / "again") == count_macs(directory)
    load_student(tmp_path / "again")


def test_tokenizer_and_chat_template(
    write, tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, directory = write()
    loaded = AutoTokenizer.from_pretrained(directory)
    text = "The river rises in the hills."
    assert loaded(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert loaded.chat_template == tiny_tokenizer.chat_template
    values = json.loads((directory / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(values.get("extra_special_tokens"), list)


@pytest.mark.parametrize("values", [{"temperature": 0.6, "top_p": 0.9}, {"pad_token_id": -1}])
def test_contradictory_generation_config_is_saved(
    tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, values: dict
) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, **values)
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path)
    save_student(tmp_path / "student", model, tiny_tokenizer, {})
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert saved.eos_token_id == 2
    assert saved.temperature == values.get("temperature", saved.temperature)


@pytest.mark.parametrize("tied", [True, False])
def test_count_macs_equals_arithmetic(write, tied: bool) -> None:
    model, directory = write(tie_word_embeddings=tied)
    embedding = VOCABULARY * HIDDEN
    target = DENSE_TARGET - SAVED_MACS
    parameters = target + NORMS + embedding * (1 if tied else 2)
    assert count_macs(directory) == Macs(target, embedding, embedding, parameters)
    assert parameters == sum(p.numel() for p in model.parameters())
    dense = dense_macs_from_config(AutoConfig.from_pretrained(directory))
    assert (dense.target, dense.head) == (DENSE_TARGET, embedding)
    assert dense.parameters - parameters == SAVED_MACS
    assert dense.total == DENSE_TARGET + embedding


def test_count_macs_of_every_family(
    family: str, tiny_dir: Callable[..., Path], tiny_model: Model
) -> None:
    directory = tiny_dir(family)
    counted = count_macs(directory)
    assert counted == dense_macs_from_config(tiny_model(family).config)
    assert counted.target == DENSE_TARGET


def test_count_macs_reads_every_shard_and_only_tensors(write) -> None:
    _, directory = write()
    whole = count_macs(directory)
    shutil.rmtree(directory)
    model, directory = write(max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_student(directory)(ids).logits, model(ids).logits)
    edit_config(directory, ranks={})
    (directory / "plan.json").write_text('{"macs": 1}')
    assert count_macs(directory) == whole


def test_count_macs_notices_hidden_compute(write) -> None:
    _, directory = write()
    before = count_macs(directory)
    state = load_file(directory / "model.safetensors")
    hidden = {**state, f"{UP1}.weight": torch.zeros(INTERMEDIATE, HIDDEN)}
    save_file(hidden, directory / "model.safetensors")
    assert count_macs(directory).target == before.target + HIDDEN * INTERMEDIATE
    save_file({**state, "adapter.weight": torch.zeros(4, 4)}, directory / "model.safetensors")
    with pytest.raises(UserError, match="adapter.weight"):
        count_macs(directory)


@pytest.mark.parametrize("fault", ["absent", "truncated", "shard", "tensor"])
def test_count_macs_refuses_incomplete_checkpoints(write, fault: str) -> None:
    _, directory = write(max_shard_size="40KB" if fault in ("shard", "tensor") else "5GB")
    file = sorted(directory.glob("model*.safetensors"))[0]
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "tensor":
        state = load_file(file)
        state.pop(sorted(state)[0])
        save_file(state, file)
    else:
        file.unlink()
    with pytest.raises(UserError, match="complete safetensors checkpoint"):
        count_macs(directory)
    with pytest.raises(UserError, match="distil it again"):
        load_student(directory)


def test_load_student_never_runs_code_from_the_directory(write) -> None:
    _, directory = write(widths={})
    (directory / "modeling_budgeted.py").write_text("raise SystemExit('this code was run')")
    load_student(directory)
    edit_config(directory, model_type="llama", ranks={})
    with pytest.raises(UserError, match="do not fit"):
        load_student(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_type": "gpt2", "model_type": "gpt2"}, "allowed are llama, mistral, qwen2"),
        ({"ranks": {Q0: 16, V0: 4, UP1: 0}}, "distil it again"),
        ({"ranks": {V0: 4, UP1: 0}}, "distil it again"),
        ({"ranks": {"model.layers.7.mlp.up_proj": 1}}, "layers.7"),
        ({"widths": {MLP2: 48}}, "distil it again"),
        ({"widths": {}}, "distil it again"),
        ({"widths": {"model.layers.7.mlp": 40}}, "layers.7"),
        ({"widths": {MLP2: 128}}, "below 128"),
    ],
)
def test_load_student_refuses(write, changes: dict, message: str) -> None:
    _, directory = write()
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=message):
        load_student(directory)


@pytest.mark.parametrize("field", ["ranks", "widths"])
def test_a_field_of_another_type_is_one_clear_line(write, field: str) -> None:
    _, directory = write()
    edit_config(directory, **{field: 5})
    with pytest.raises(UserError, match="its config.json has a wrong value .*; distil") as raised:
        load_student(directory)
    assert "\n" not in str(raised.value)
    edit_config(directory, **{field: {"ranks": RANKS, "widths": WIDTHS}[field]})
    load_student(directory)


def test_load_student_refuses_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        load_student(tmp_path / "nowhere")


@pytest.mark.parametrize("ranks", [{}, {Q0: 8}, {**RANKS, Q0: 9}, {**RANKS, UP1: 2}])
def test_save_student_refuses_ranks_that_lie(
    tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, ranks: dict
) -> None:
    model = tiny_model("llama")
    apply_structure(model, RANKS)
    with pytest.raises(ValueError, match="ranks say"):
        save_student(tmp_path / "student", model, tiny_tokenizer, ranks)


@pytest.mark.parametrize("widths", [None, {}, {MLP2: 41}, {**WIDTHS, "model.layers.0.mlp": 40}])
def test_save_student_refuses_widths_that_lie(
    tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, widths: dict | None
) -> None:
    model = tiny_model("llama")
    apply_structure(model, RANKS, WIDTHS)
    with pytest.raises(ValueError, match="widths say"):
        save_student(tmp_path / "student", model, tiny_tokenizer, RANKS, widths)


def test_save_student_refuses_a_head_that_is_secretly_untied(
    tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    with pytest.raises(ValueError, match="two tensors"):
        save_student(tmp_path / "student", model, tiny_tokenizer, {})


def test_dense_state_and_copy_dtype(write, tiny_tokenizer, tmp_path: Path) -> None:
    model, directory = write()
    state = dense_state(load_student(directory))
    pair = model.get_submodule(Q0)
    torch.testing.assert_close(state[f"{Q0}.weight"], pair.up.weight @ pair.down.weight)
    assert not state[f"{UP1}.weight"].any()
    narrow = model.get_submodule(MLP2)
    for leaf in PROJECTIONS:
        padded, weight = state[f"{MLP2}.{leaf}.weight"], getattr(narrow, leaf).weight
        assert padded.shape == ((HIDDEN, INTERMEDIATE) if leaf == "down_proj"
                                else (INTERMEDIATE, HIDDEN))  # fmt: skip
        rows, columns = weight.shape
        assert torch.equal(padded[:rows, :columns], weight)
        assert not padded[rows:].any() and not padded[:, columns:].any()
    save_dense_copy(tmp_path / "dense", model, tiny_tokenizer, dtype=torch.bfloat16)
    loaded = load_student(tmp_path / "dense")
    assert loaded.dtype == torch.bfloat16 and type(loaded) is LlamaForCausalLM
    assert count_macs(tmp_path / "dense").target == DENSE_TARGET
