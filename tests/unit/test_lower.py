"""The finished graph holds what the plan says, and one that does not is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedTokenizerFast

from distill.plan import Plan, keep_decisions, modules_of
from export.lower import LoweredCounts, check_lowered, lower, save_onnx, untie_head
from tests.parity.lower_cases import RANK, Cases, Lowered, plan_of, save_case, student_model

FLAVOURS = ("ort", "standard")


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    return Cases(tmp_path_factory, tiny_tokenizer).directory


def plan_in(directory: Path) -> Plan:
    return Plan.load(directory / "plan.json")


# What the graph holds.


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("mix", "dense", "factored", "removed", "dead"),
    [
        ("keep", 21, 0, 0, 0),
        ("factored", 0, 21, 0, 0),
        ("narrow", 6, 15, 0, 0),
        ("outputs removed", 4, 6, 3, 8),
        ("inputs removed", 6, 8, 3, 4),
        ("values removed", 6, 5, 3, 7),
        ("layer removed", 4, 6, 3, 8),
    ],
)
def test_counts(
    mix: str,
    dense: int,
    factored: int,
    removed: int,
    dead: int,
    flavour: Any,
    student: Callable[..., Path],
) -> None:
    directory = student("llama", mix)
    counts = check_lowered(lower(directory, flavour=flavour, precision="fp32"), plan_in(directory))
    assert (counts.dense, counts.factored, counts.removed, counts.dead) == (
        dense,
        factored,
        removed,
        dead,
    )
    assert counts.matmuls == dense + 2 * factored
    if not dead:
        assert counts.macs == plan_in(directory).macs
    else:
        assert counts.macs < plan_in(directory).macs
    assert counts.to_json()["dense_matmuls"] == dense


def test_a_whole_layer_may_vanish(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Nothing of layer 1 is left but its growing cache."""
    model = student_model("llama", "layer removed")
    directory = save_case(tmp_path / "student", model, tiny_tokenizer)
    graph = lower(directory, flavour="ort", precision="fp32").graph
    names = [node.name or "" for node in graph]
    assert [name for name in names if "layers.1." in name] == []
    assert {"present.1.key", "present.1.value"} <= set(names)


@pytest.mark.parametrize("mix", ["factored", "narrow"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shared_inputs_make_fewer_matmuls(
    flavour: Any, mix: str, student: Callable[..., Path]
) -> None:
    directory = student("llama", mix)
    plan = plan_in(directory)
    apart, together = (
        check_lowered(lower(directory, flavour=flavour, precision="fp32", share_inputs=share), plan)
        for share in (False, True)
    )
    pairs = {"factored": 3, "narrow": 1}[mix]  # of a gate and an up
    assert apart.matmuls - together.matmuls == 3 * 2 + pairs
    assert replace(together, matmuls=apart.matmuls, nodes=apart.nodes) == replace(
        apart, weight_bytes=together.weight_bytes
    )


@pytest.mark.parametrize(
    ("mix", "path", "shape"),
    [
        ("factored", "model.layers.1.mlp.gate_proj.down", (64, RANK)),
        ("narrow", "model.layers.0.mlp.up_proj", (64, 96)),
        ("narrow", "model.layers.2.mlp.down_proj", (40, 64)),
    ],
)
def test_names_and_weights_are_those_of_the_state_dict(
    mix: str, path: str, shape: tuple[int, int], student: Callable[..., Path]
) -> None:
    directory = student("llama", mix)
    graph = lower(directory, flavour="ort", precision="fp32").graph
    stored = load_file(directory / "model.safetensors")
    node = next(node for node in graph if node.name == path)
    assert node.op_type == "MatMul"
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    assert weight.name == f"{path}.weight" and weight.const_value.numpy().shape == shape
    expected = stored[f"{path}.weight"].float().numpy().T
    assert np.array_equal(weight.const_value.numpy(), expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_metadata_inputs_and_outputs(flavour: Any, student: Callable[..., Path]) -> None:
    model = lower(student("gemma3_text", "factored"), flavour=flavour, precision="fp16")
    assert (model.producer_name, model.ir_version) == ("budgeted-lora", 10)
    domains = {"": 23} | ({"com.microsoft": 1} if flavour == "ort" else {})
    assert dict(model.graph.opset_imports) == domains
    cache = [f"{n}.{kind}" for n in range(3) for kind in ("key", "value")]
    assert [value.name for value in model.graph.inputs] == [
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{name}" for name in cache),
        "logits_to_keep",
    ]
    assert [value.name for value in model.graph.outputs] == [
        "logits",
        *(f"present.{name}" for name in cache),
    ]
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT16}
    assert not any(
        np.isinf(value.const_value.numpy()).any()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT16
    )


@pytest.mark.parametrize("mix", ["factored", "narrow"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_standard_flavour_passes_the_onnx_checker(
    family: str, precision: Any, mix: str, student: Callable[..., Path], tmp_path: Path
) -> None:
    save_onnx(lower(student(family, mix), flavour="standard", precision=precision), tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


# The postconditions refuse.


def without_node(name: str) -> Callable[[ir.Model], None]:
    """Let the readers of a node read its input."""

    def change(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.name == name)
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)

    return change


def drop_weight(model: ir.Model) -> None:
    model.graph.initializers["model.layers.0.mlp.up_proj.up.weight"].shape = ir.Shape([RANK, 5])


def add_identity(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.name == "model.layers.1.mlp/gated")
    copy = ir.node("Identity", [node.inputs[0]], name="copy")
    model.graph.insert_before(node, copy)
    node.replace_input_with(0, copy.outputs[0])


def add_dead_node(model: ir.Model) -> None:
    model.graph.append(ir.node("Neg", [model.graph.inputs[0]], name="lonely"))


def add_unused_initializer(model: ir.Model) -> None:
    tensor = ir.Tensor(np.zeros(1, np.float32), name="spare")
    model.graph.register_initializer(ir.Value(name="spare", const_value=tensor))


def add_second_use(model: ir.Model) -> None:
    nodes = {node.name: node for node in model.graph}
    twin = ir.node("MatMul", nodes["model.layers.0.mlp.up_proj.up"].inputs, name="another")
    gated = nodes["model.layers.0.mlp/gated"]
    twin.outputs[0].name = "another"
    model.graph.insert_before(gated, twin)
    total = ir.node("Add", [gated.inputs[0], twin.outputs[0]], name="sum")
    model.graph.insert_before(gated, total)
    gated.replace_input_with(0, total.outputs[0])


def import_unused_domain(model: ir.Model) -> None:
    model.graph.opset_imports["com.example"] = 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without_node("model.layers.2.self_attn.q_proj.up"), "q_proj.up"),
        (drop_weight, "up_proj.up"),
        (add_identity, "Identity"),
        (add_dead_node, "lonely"),
        (add_unused_initializer, "spare"),
        (add_second_use, "another"),
        (import_unused_domain, "com.example"),
    ],
)
def test_a_wrong_graph_is_refused(
    change: Callable[[ir.Model], None], word: str, student: Callable[..., Path]
) -> None:
    directory = student("llama", "factored")
    model = lower(directory, flavour="ort", precision="fp32")
    change(model)
    with pytest.raises(ValueError, match=word):
        check_lowered(model, plan_in(directory))


def test_another_plan_is_refused(student: Callable[..., Path]) -> None:
    model = lower(student("llama", "factored"), flavour="ort", precision="fp32")
    with pytest.raises(ValueError, match="the plan says"):
        check_lowered(model, plan_in(student("llama", "outputs removed")))


@pytest.mark.parametrize("module", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("changes", [{"rank": 95}, {"action": "keep"}], ids=str)
def test_another_width_is_refused(
    changes: dict[str, Any], module: str, student: Callable[..., Path]
) -> None:
    directory, name = student("llama", "narrow"), f"model.layers.0.mlp.{module}"
    model, plan = lower(directory, flavour="ort", precision="fp32"), plan_in(directory)
    check_lowered(model, plan)
    others = tuple(replace(d, **changes) if d.module == name else d for d in plan.decisions)
    with pytest.raises(ValueError, match=f"{name}: the graph multiplies by"):
        check_lowered(model, replace(plan, decisions=others))


# The head.


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_untied_head_computes_the_same(
    flavour: Any, loaded: bool, student: Callable[..., Path], tmp_path: Path
) -> None:
    directory = student("qwen3", "factored")
    tied = tmp_path / "tied"
    tied.mkdir()
    save_onnx(lower(directory, flavour=flavour, precision="fp32"), tied)
    model = ir.load(tied / "model.onnx")
    if not loaded:
        model = lower(directory, flavour=flavour, precision="fp32")
    assert untie_head(model)
    assert not untie_head(model)
    check_lowered(model, plan_in(directory))
    head = next(node for node in model.graph if node.name == "lm_head")
    assert head.op_type == "MatMul" and model.graph.outputs[0].name == "logits"
    save_onnx(model, tmp_path)
    ids_BS = np.arange(24).reshape(2, 12)
    expected, got = (Lowered(folder).step(ids_BS, keep=3)[0] for folder in (tied, tmp_path))
    assert np.abs(expected - got).max() < 1e-5


def test_a_tied_table_is_stored_once(student: Callable[..., Path]) -> None:
    sizes = {}
    for untied in (False, True):
        model = lower(student("llama", "keep"), flavour="ort", precision="fp32")
        if untied:
            untie_head(model)
        sizes[untied] = check_lowered(model, plan_in(student("llama", "keep"))).weight_bytes
    assert sizes[True] - sizes[False] == pytest.approx(384 * 64 * 4, abs=100)


# Files.


def test_weights_lie_aligned_in_one_file_beside_the_graph(
    student: Callable[..., Path], tmp_path: Path
) -> None:
    save_onnx(lower(student("llama", "factored"), flavour="ort", precision="fp32"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    model = onnx.load_model(tmp_path / "model.onnx", load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)
    inside = sum(len(t.raw_data) for t in model.graph.initializer)
    assert inside < 4096 < (tmp_path / "model.onnx.data").stat().st_size


@pytest.mark.slow
def test_more_than_two_gigabytes(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A table of 2 GiB, zeros but for its last row, comes back from beyond protobuf's limit."""
    vocabulary, hidden = 2**19 + 8, 1024
    student = sparse_student(tmp_path / "student", vocabulary, hidden)
    save_onnx(lower(student, flavour="ort", precision="fp32"), tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31
    assert (tmp_path / "model.onnx").stat().st_size < 2**20
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    empty = np.zeros((1, 1, 0, 16), np.float32)
    inputs = {
        "input_ids": np.array([[0, vocabulary - 1]]),
        "attention_mask": np.ones((1, 2), np.int64),
        "position_ids": np.array([[0, 1]]),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }
    logits, *_ = session.run(None, inputs)
    assert not logits[0, 0].any()
    assert logits[0, 1].argmax() == vocabulary - 1
    assert logits[0, 1, -1] == pytest.approx(hidden, rel=1e-3)


def sparse_student(directory: Path, vocabulary: int, hidden: int) -> Path:
    """A one-layer llama in bfloat16 whose weights are a hole in a file, but for a last row of 1."""
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = student_like(config)
    Plan(1.0, "budgeted", "keep", 32, keep_decisions(modules_of(targets(model)))).save(
        directory / "plan.json"
    )
    header, offset = {}, 0
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    table = shapes.pop("model.embed_tokens.weight")
    for name, shape in [*shapes.items(), ("model.embed_tokens.weight", table)]:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        one = np.ones(1, ml_dtypes.bfloat16).tobytes()
        file.truncate(start + offset)
        file.seek(start + header["model.norm.weight"]["data_offsets"][0])
        file.write(hidden * one)
        file.seek(start + offset - 2 * hidden)
        file.write(hidden * one)
    return directory


def student_like(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def targets(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: module for name, module in linears.items() if ".layers." in name}


def test_plan_of_a_model_equals_its_saved_plan(student: Callable[..., Path]) -> None:
    for mix in ("outputs removed", "narrow"):
        assert plan_in(student("llama", mix)) == plan_of(student_model("llama", mix))
    assert isinstance(LoweredCounts(1, 2, 3, 4, 5, 6, 7, 8).to_json()["nodes"], int)
