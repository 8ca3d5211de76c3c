"""Plain operators compute what the standard graph does, and are those of TensorRT 10.3's parser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from distill.plan import Plan
from export.lower import lower, save_onnx
from export.quantize import quantize
from export.quantize_balance import Balance
from export.quantize_file import SourceGraph
from export.quantize_graph import matrices_of, weight_of
from export.session import OrtModel
from export.trt_plain import PARSED, plain_model, write_plain
from tests.parity.lower_cases import save_case, student_model

NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding", "Gelu"}
LARGEST_DIFFERENCE = {"fp32": 1e-5, "fp16": 1e-2}
LARGEST_RELATIVE_ERROR = {"int8": 0.1, "int4": 0.8}


MIXES = ("factored", "narrow")


@pytest.fixture
def mix() -> str:
    return "factored"


@pytest.fixture
def student(family: str, mix: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_case(tmp_path / "student", student_model(family, mix), tiny_tokenizer)


def standard(student: Path, precision: Any) -> Path:
    directory = student.parent / f"standard-{precision}"
    directory.mkdir()
    save_onnx(lower(student, flavour="standard", precision=precision), directory)
    shutil.copyfile(student / "config.json", directory / "config.json")
    return directory


def plain(source: Path) -> Path:
    directory = Path(shutil.copytree(source, source.with_name(f"plain-{source.name}")))
    write_plain(source, directory)
    return directory


def answers(directory: Path) -> list[np.ndarray]:
    """Logits of a left-padded prompt of two sequences and of one more token after it."""
    model = OrtModel.open(directory, threads=1)
    ids_BT = np.random.default_rng(0).integers(3, model.vocabulary, (2, 9))
    mask_BT = np.ones((2, 9), np.int64)
    mask_BT[1, :3] = 0
    positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)
    first, past = model.step(ids_BT[:, :8], mask_BT[:, :8], positions_BT[:, :8])
    last, _ = model.step(ids_BT[:, 8:], mask_BT, positions_BT[:, 8:], past)
    return [first[0], first[1, 3:], last]


def largest_difference(one: Path, other: Path) -> float:
    pairs = zip(answers(one), answers(other), strict=True)
    return max(float(np.abs(a.astype(np.float32) - b).max()) for a, b in pairs)


def relative_error(one: Path, other: Path) -> float:
    """Norm of the difference of all logits ÷ that of the first's."""
    a, b = (np.concatenate([part.ravel() for part in answers(each)]) for each in (one, other))
    return float(np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(a.astype(np.float32)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_family_says_the_same_in_plain_operators(student: Path, precision: Any) -> None:
    source = standard(student, precision)
    result = plain(source)
    assert largest_difference(source, result) < LARGEST_DIFFERENCE[precision]
    onnx.checker.check_model(result / "model.onnx")
    model = onnx.load_model(result / "model.onnx", load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert kinds <= PARSED and not PARSED & NEWER
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_norms_and_softmax_stay_islands_of_float32(student: Path) -> None:
    source = standard(student, "fp16")
    model = onnx.load_model(plain(source) / "model.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "ReduceMean", "Sqrt"):
            assert types[node.input[0]] == onnx.TensorProto.FLOAT, node.name


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_wrong_sign_in_a_rotation_is_seen(student: Path) -> None:
    """The comparison above would not pass a wrong graph."""
    source = standard(student, "fp32")
    result = plain(source)
    model = onnx.load_model(result / "model.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.name.endswith("/minus")).op_type = "Sqrt"
    (result / "model.onnx").write_bytes(model.SerializeToString())
    assert not largest_difference(source, result) < LARGEST_DIFFERENCE["fp32"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_has_no_plain_form_is_refused(student: Path) -> None:
    model = onnx.load_model(standard(student, "fp32") / "model.onnx", load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    with pytest.raises(ValueError, match="softcap"):
        plain_model(model)
    attention.op_type = "GroupQueryAttention"
    with pytest.raises(ValueError, match="GroupQueryAttention"):
        plain_model(model)


def integers(full: Path, half: Path, precision: Any) -> Path:
    directory = full.parent / "integers"
    directory.mkdir()
    quantize(full, directory, precision, into=half, method="nearest", show_progress=False)
    write_plain(directory, directory)
    return directory


@pytest.mark.parametrize("mix", ["narrow"])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_neurons_in_another_order_are_seen(student: Path, precision: Any) -> None:
    full, half = standard(student, "fp32"), standard(student, "fp16")
    tensors = load_file(student / "model.safetensors")
    for block in Plan.load(student / "plan.json").widths:
        tensors[f"{block}.down_proj.weight"] = tensors[f"{block}.down_proj.weight"].roll(1, dims=1)
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(full)
    directory = integers(standard(student, "fp32"), half, precision)
    assert not relative_error(half, directory) < LARGEST_RELATIVE_ERROR[precision]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_are_laid_out_as_tensorrt_wants_them(student: Path, precision: Any) -> None:
    """One scale a row at 8 bits; blocks of 64 at 4 bits, and 8 bits where 64 does not divide."""
    full, half = standard(student, "fp32"), standard(student, "fp16")
    directory = integers(full, half, precision)
    model = onnx.load_model(directory / "model.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    seen = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale = (tensors[name] for name in node.input)
        attributes = {a.name: a.i for a in node.attribute}
        assert scale.data_type == onnx.TensorProto.FLOAT16
        seen.add(weight.data_type)
        if weight.data_type == onnx.TensorProto.INT8:
            assert list(scale.dims) == [weight.dims[attributes["axis"]]]
            assert "block_size" not in attributes
        else:
            assert attributes["block_size"] == 64
    assert onnx.TensorProto.INT8 in seen
    assert model.opset_import[0].version == (21 if onnx.TensorProto.INT4 in seen else 19)
    assert relative_error(half, directory) < LARGEST_RELATIVE_ERROR[precision]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_balancing_keeps_every_product(student: Path) -> None:
    """A pair's; what is no pair stays as it is."""
    source = SourceGraph(standard(student, "fp32"))
    named = {matrix.name: matrix for matrix in matrices_of(source)}
    balance = Balance(source, list(named.values()), frozenset(named))
    pairs = [name.removesuffix(".up") for name in named if name.endswith(".up")]
    plan = Plan.load(student / "plan.json")
    assert set(pairs) == set(plan.ranks)
    for module in pairs:
        down, up = named[f"{module}.down"], named[f"{module}.up"]
        product = weight_of(source, up) @ weight_of(source, down)
        balanced_up = balance.weight(up)
        np.testing.assert_allclose(balanced_up @ balance.weight(down), product, atol=1e-5)
        np.testing.assert_allclose(np.square(balanced_up).mean(0), 1, rtol=1e-4)
    narrow = [d.module for d in plan.decisions if d.action == "narrow"]
    assert len(narrow) == 3 * len(plan.widths)
    for name in (*narrow, "lm_head"):
        np.testing.assert_array_equal(balance.weight(named[name]), weight_of(source, named[name]))


def test_numbers_take_the_type_of_what_they_meet() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, ["batch", 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, ["batch", 4])
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], "gelu")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 20)]
    result = plain_model(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))
    kinds = {tensor.data_type for tensor in result.graph.initializer}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    assert all(numpy_helper.to_array(t).size == 1 for t in result.graph.initializer)
