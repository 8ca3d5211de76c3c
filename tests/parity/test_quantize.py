"""Integers stand for the weights they were made from, in the file, in the runtime, in the gate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from distill.artifact import UserError
from distill.modeling_budgeted import FactoredLinear, apply_structure
from export.files import copy_companions
from export.lower import lower, save_onnx
from export.parity import ParityError, check_parity
from export.quantize import quantize
from export.quantize_blocks import Blocks, packed_nibbles, quantised_blocks
from export.quantize_calibrate import gptq_blocks, input_covariances, self_text
from export.quantize_file import SourceGraph
from export.quantize_fit import worst
from export.quantize_graph import matrices_of
from export.session import OrtModel
from tests.conftest import TRAINING_TEXT, build_tiny_model
from tests.parity.lower_cases import block_of, randomise, save_case

RNG = np.random.default_rng(0)
WEIGHT_NK = RNG.normal(size=(48, 128)).astype(np.float32)
SIZES: dict[str, Any] = {"max_seq": 24, "max_past": 60, "threads": 1, "show_progress": False}


def error(blocks: Blocks, w_NK: np.ndarray = WEIGHT_NK) -> float:
    return float(np.square(blocks.dequantised() - w_NK).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_within_a_step(bits: int, block: int, symmetric: bool) -> None:
    blocks = quantised_blocks(WEIGHT_NK, bits, block, symmetric=symmetric)
    assert blocks.block == block and int(blocks.q_NK.max()) < 2**bits
    if symmetric:
        assert (blocks.zero_NG == 2 ** (bits - 1)).all()
    off_NGB = np.abs(blocks.dequantised() - WEIGHT_NK).reshape(48, -1, block)
    steps = off_NGB / np.abs(blocks.scale_NG)[..., None]
    assert np.median(steps) < 0.3
    assert steps.max() <= (2.5 if bits == 4 else 1.01)  # clipped, or the one level that is missing


def test_odd_blocks() -> None:
    """Zeros, one value, one sign: no division by zero, nothing far off."""
    for w_NK in (
        np.zeros((2, 32)),
        np.full((2, 32), 3.0),
        np.full((2, 32), -1e-6),
        -(WEIGHT_NK**2),
    ):
        w_NK = w_NK.astype(np.float32)
        for symmetric in (False, True):
            got = quantised_blocks(w_NK, 4, 32, symmetric=symmetric).dequantised()
            np.testing.assert_allclose(got, w_NK, atol=0.15 * np.abs(w_NK).max())


def test_fitting_beats_rounding_and_importance_is_heeded() -> None:
    fitted = quantised_blocks(WEIGHT_NK, 4, 32)
    w_NGB = WEIGHT_NK.reshape(48, 4, 32)
    low, high = w_NGB.min(-1, keepdims=True), w_NGB.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    nearest = (np.clip(np.rint(w_NGB / scale) + zero, 0, 15) - zero) * scale
    assert error(fitted) < 0.96 * float(np.square(nearest - w_NGB).mean())
    importance_K = np.where(np.arange(128) % 4 == 0, 50.0, 1.0)
    heeded = quantised_blocks(WEIGHT_NK, 4, 32, importance_K=importance_K)
    weighted = [
        float((importance_K * np.square(b.dequantised() - WEIGHT_NK)).mean())
        for b in (heeded, fitted)
    ]
    assert weighted[0] < 0.8 * weighted[1] and error(heeded) > error(fitted)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_makes_up_for_rounding(symmetric: bool) -> None:
    """On correlated inputs its outputs are nearer, on white ones no worse than the blocks' fit."""
    mixing_KK = RNG.normal(size=(128, 128)) * np.exp(-np.arange(128) / 20)
    covariance_KK = (mixing_KK @ mixing_KK.T).astype(np.float32)
    white_KK = np.eye(128, dtype=np.float32)
    losses = {}
    for name, cov_KK in (("correlated", covariance_KK), ("white", white_KK)):
        for method in ("gptq", "blocks"):
            if method == "gptq":
                blocks = gptq_blocks(WEIGHT_NK, cov_KK, 4, 32, symmetric=symmetric)
            else:
                importance_K = np.diag(cov_KK)
                blocks = quantised_blocks(
                    WEIGHT_NK, 4, 32, symmetric=symmetric, importance_K=importance_K
                )
            off_NK = blocks.dequantised() - WEIGHT_NK
            losses[name, method] = float(np.einsum("nk,kj,nj->", off_NK, cov_KK, off_NK))
    assert losses["correlated", "gptq"] < 0.5 * losses["correlated", "blocks"]
    assert losses["white", "gptq"] == pytest.approx(losses["white", "blocks"], rel=1e-3)


def test_nibbles() -> None:
    values = np.array([[1, 2, 15], [0, 7, 8]], np.uint8)
    np.testing.assert_array_equal(packed_nibbles(values), [[0x21, 0x0F], [0x70, 0x08]])


def tiny_student(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    rank: int = 32,
    *,
    widths: Mapping[str, int] | None = None,
    **overrides: Any,
) -> Path:
    """A llama whose ranks are multiples of 32, with every other module factored, but for the MLPs
    that `widths` narrows."""
    model = build_tiny_model("llama", **overrides)
    widths = widths or {}
    names = [n for n, m in model.named_modules() if n.endswith("_proj")]
    ranks = {**dict.fromkeys(names[::2], rank), names[3]: 0}
    apply_structure(model, {n: r for n, r in ranks.items() if block_of(n) not in widths}, widths)
    randomise(model, std=0.1)
    return save_case(directory, model, tokenizer)


def lowered(
    student: Path, directory: Path, flavour: Any, precision: Any = "fp32", *, shares: bool = False
) -> Path:
    directory.mkdir()
    graph = lower(student, flavour=flavour, precision=precision, share_inputs=shares)
    save_onnx(graph, directory)
    copy_companions(student, directory)
    return directory


Made = Callable[[str, bool], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Made:
    """(student, float32 graph) by flavour and whether head and embedding are tied."""
    done: dict[tuple[str, bool], tuple[Path, Path]] = {}

    def pair(flavour: str, tied: bool) -> tuple[Path, Path]:
        if (flavour, tied) not in done:
            root = tmp_path_factory.mktemp(f"{flavour}-{tied}")
            student = tiny_student(root / "student", tiny_tokenizer, tie_word_embeddings=tied)
            done[flavour, tied] = student, lowered(student, root / "fp32", flavour)
        return done[flavour, tied]

    return pair


def quantised(source: Path, directory: Path, precision: str, **options: Any) -> Any:
    directory.mkdir()
    return quantize(source, directory, precision, show_progress=False, **options)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_graph_passes_the_gate(
    made: Made, tmp_path: Path, flavour: str, precision: str, tied: bool
) -> None:
    student, source = made(flavour, tied)
    result = quantised(source, tmp_path / "q", precision)
    assert (result.flavour, result.bits) == (flavour, int(precision[3:]))
    assert result.shared_table == (tied and flavour == "ort")
    assert result.method == {"int8": "nearest", "int4": "fitted"}[precision]
    report = check_parity(student, tmp_path / "q", precision=precision, text=TRAINING_TEXT, **SIZES)
    assert report.kl > 0
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert {path.name for path in source.iterdir()} == names
    assert result.weight_bytes < {"int8": 0.5, "int4": 0.42}[precision] * result.float_bytes


MLP0 = "model.layers.0.mlp"
NARROW = {MLP0: 96, "model.layers.1.mlp": 32}


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_narrow_mlps_pass_the_gate(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, flavour: str, precision: str
) -> None:
    student = tiny_student(tmp_path / "student", tiny_tokenizer, widths=NARROW)
    source = lowered(student, tmp_path / "fp32", flavour, shares=flavour == "ort")
    result = quantised(source, tmp_path / "q", precision)
    columns = {m.name: m.columns for m in matrices_of(SourceGraph(source))}
    assert {block: columns[f"{block}.down_proj"] for block in NARROW} == NARROW
    assert result.matrices == len(columns)
    check_parity(student, tmp_path / "q", precision=precision, text=TRAINING_TEXT, **SIZES)


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_twin_neurons_in_another_order_are_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, flavour: str, precision: str
) -> None:
    student = tiny_student(tmp_path / "student", tiny_tokenizer, widths=NARROW)
    other = Path(shutil.copytree(student, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    for block in NARROW:
        name = f"{block}.down_proj.weight"
        tensors[name] = tensors[name].roll(1, dims=1).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    quantised(lowered(other, tmp_path / "fp32", flavour), tmp_path / "q", precision)
    with pytest.raises(ParityError, match="differs from"):
        check_parity(student, tmp_path / "q", precision=precision, text=TRAINING_TEXT, **SIZES)


@pytest.mark.parametrize("flavour", ["ort", "standard"])
def test_no_matrix_stays_in_float32(made: Made, tmp_path: Path, flavour: str) -> None:
    """All matmuls read integers, the standard flavour in standard operators alone."""
    _, source = made(flavour, True)
    result = quantised(source, tmp_path / "q", "int4", method="nearest")
    model = onnx.load(tmp_path / "q" / "model.onnx", load_external_data=False)
    wide = [t.name for t in model.graph.initializer if t.data_type == 1 and len(t.dims) == 2]
    assert all(name.endswith("_scales") for name in wide)
    counts = {kind: 0 for kind in ("MatMulNBits", "DequantizeLinear", "GatherBlockQuantized")}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        assert flavour == "ort" or node.domain == ""
    integer = "MatMulNBits" if flavour == "ort" else "DequantizeLinear"
    source_graph = onnx.load(source / "model.onnx", load_external_data=False).graph
    matmuls = [node for node in source_graph.node if node.op_type in ("MatMul", "Gemm")]
    assert counts[integer] == result.matrices == len(matmuls)
    assert result.nodes == len(model.graph.node)
    if flavour == "ort":
        assert counts["GatherBlockQuantized"] == 1 and "Gather" not in counts
    else:
        assert TensorProto.FLOAT16 in {t.data_type for t in model.graph.initializer}


def test_a_shared_table_is_stored_once(made: Made, tmp_path: Path) -> None:
    _, source = made("ort", True)
    quantised(source, tmp_path / "q", "int8")
    model = onnx.load(tmp_path / "q" / "model.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
    }
    table = next(name for name in places if name.endswith("_table"))
    head = table.replace("_table", "_quantised")
    assert places[table] == places[head] and places[table]["length"] == str(384 * 64)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("flavour", ["ort", "standard"])
def test_twin_one_wrong_scale_is_refused(
    made: Made, tmp_path: Path, flavour: str, precision: str
) -> None:
    student, source = made(flavour, True)
    quantised(source, tmp_path / "q", precision)
    path = tmp_path / "q" / "model.onnx"
    model = onnx.load(path)
    scales = [t for t in model.graph.initializer if t.name.endswith("_scales")]
    if precision == "int8":
        tensor = next(t for t in scales if t.name.endswith("o_proj.weight_scales"))
    else:  # what int4 may lose would hide one module of a random model: the head's
        tensor = max(scales, key=lambda t: math.prod(t.dims))
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * values, tensor.name))
    (tmp_path / "q" / "model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    with pytest.raises(ParityError, match="differs from"):
        check_parity(student, tmp_path / "q", precision=precision, text=TRAINING_TEXT, **SIZES)


def test_the_runtime_reads_what_was_written() -> None:
    """MatMulNBits, GatherBlockQuantized and DequantizeLinear on the very layouts we write."""
    from export.quantize_file import WeightFile
    from export.quantize_graph import (
        Matrix,
        put_matmul_nbits,
        put_quantised_embedding,
        put_weight_dequantised,
    )

    x_SK = RNG.normal(size=(5, 128)).astype(np.float32)
    for bits in (4, 8):
        for block in (16, 32, 64, 128):
            for symmetric in (False, True):
                blocks = quantised_blocks(WEIGHT_NK, bits, block, symmetric=symmetric)
                source, file = RecordingGraph(), InMemoryFile()
                graph: SourceGraph = source  # type: ignore[assignment]
                weights: WeightFile = file  # type: ignore[assignment]
                node = helper.make_node("Gemm", ["x", "t"], ["y"], name="head", transB=1)
                matrix = Matrix(node, "t", *WEIGHT_NK.shape, True)
                put_matmul_nbits(graph, weights, matrix, blocks)
                gather = helper.make_node("Gather", ["t", "ids"], ["rows"], name="embedding")
                put_quantised_embedding(graph, weights, gather, blocks, "t")
                if symmetric:
                    for transposed, name in ((True, "g"), (False, "m")):
                        kind = ("Gemm", {"transB": 1}) if transposed else ("MatMul", {})
                        node = helper.make_node(
                            kind[0], ["x", name], [f"y_{name}"], name, **kind[1]
                        )
                        matrix = Matrix(node, name, *WEIGHT_NK.shape, transposed)
                        put_weight_dequantised(graph, weights, matrix, blocks)
                ids = np.array([0, 3, 47])
                results = run(source.nodes, file.initializers, {"x": x_SK, "ids": ids})
                w_NK = blocks.dequantised()
                np.testing.assert_array_equal(results.pop("rows"), w_NK[ids])
                largest = np.abs(x_SK @ w_NK.T).max()
                for name, y_SN in results.items():
                    off = 0.01 if name == "y" else 1e-5  # MatMulNBits rounds x to int8
                    np.testing.assert_allclose(y_SN, x_SK @ w_NK.T, atol=off * largest)


class RecordingGraph:
    float_type = np.dtype(np.float32)

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def replace(self, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
        self.nodes += new


class InMemoryFile:
    def __init__(self) -> None:
        self.initializers: list[TensorProto] = []

    def add(self, name: str, array: np.ndarray, kind: Any = None, dims: Any = ()) -> None:
        kind = kind or helper.np_dtype_to_tensor_dtype(array.dtype)
        raw = np.ascontiguousarray(array).tobytes()
        self.initializers.append(helper.make_tensor(name, kind, dims or array.shape, raw, raw=True))

    def alias(self, name: str, of: str, dims: tuple[int, ...]) -> None:
        tensor = TensorProto()
        tensor.CopyFrom(next(t for t in self.initializers if t.name == of))
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(dims)
        self.initializers.append(tensor)


def run(
    nodes: list[onnx.NodeProto], initializers: list[TensorProto], feed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every result of a graph that no node of it reads."""
    read = {name for node in nodes for name in node.input}
    outputs = [name for node in nodes for name in node.output if name not in read]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in feed.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()  # optimised, DequantizeLinear may become MatMulNBits
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return dict(zip(outputs, session.run(outputs, feed), strict=True))


def test_calibration_sees_the_inputs(made: Made) -> None:
    """Self text starts with bos and repeats by seed; covariances are those of the values."""
    _, source = made("ort", True)
    model = OrtModel.open(source)
    ids_BT = self_text(model, rows=3, tokens=12, seed=1)
    assert ids_BT.shape == (3, 12) and (ids_BT[:, 0] == 1).all() and len(np.unique(ids_BT)) > 10
    np.testing.assert_array_equal(ids_BT, self_text(model, rows=3, tokens=12, seed=1))
    assert (ids_BT != self_text(model, rows=3, tokens=12, seed=2)).any()
    name = "model.layers.1.input_layernorm"
    covariance = input_covariances(model, [name], ids_BT)[name]
    one_by_one = [input_covariances(model, [name], row_T[None])[name] for row_T in ids_BT]
    np.testing.assert_allclose(covariance, np.mean(one_by_one, 0), rtol=1e-4, atol=1e-5)


def test_refusals(made: Made, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    student, source = made("ort", True)
    out = tmp_path / "out"
    out.mkdir()
    quantised(source, tmp_path / "int8", "int8")
    half = lowered(student, tmp_path / "fp16", "ort", "fp16")
    odd_student = tiny_student(tmp_path / "odd", tiny_tokenizer, rank=20)
    odd = lowered(odd_student, tmp_path / "odd-fp32", "standard")
    thin_student = tiny_student(tmp_path / "thin", tiny_tokenizer, widths={MLP0: 40})
    thin = lowered(thin_student, tmp_path / "thin-fp32", "standard")
    wide = {"block": 128}
    for bad, precision, options, match in (
        (source, "fp16", {}, "'fp16'; allowed are int8, int4"),
        (source, "int4", {"block": 48}, "block 48; allowed are 16, 32, 64"),
        (source, "int4", wide, r"proj.* has 64 inputs, which blocks of 128 do not divide"),
        (odd, "int8", {}, r"proj.up has 20 inputs.*rank-multiple 32"),
        (thin, "int8", {}, r"down_proj has 40 inputs.*ranks and widths.*rank-multiple 32"),
        (tmp_path / "int8", "int4", {}, "holds GatherBlockQuantized; only a float32 graph"),
        (half, "int8", {}, "outputs of FLOAT16; only a float32 graph"),
    ):
        with pytest.raises(UserError, match=match):
            quantize(bad, out, precision, show_progress=False, **options)
    (source / "model.onnx").rename(tmp_path / "aside")
    try:
        with pytest.raises(UserError, match="model.onnx cannot be read"):
            quantize(source, out, "int8", show_progress=False)
    finally:
        (tmp_path / "aside").rename(source / "model.onnx")


def test_matrices_are_widened_until_the_text_agrees(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without the rule, int4 stays as far from float32 as it was."""
    _, source = made("ort", True)
    monkeypatch.setattr("export.quantize_fit.LARGEST_KL", 100.0)
    before = quantised(source, tmp_path / "before", "int4")
    assert before.eight_bit_matrices == 0 and before.self_text_kl > 0
    limit = before.self_text_kl / 4
    monkeypatch.setattr("export.quantize_fit.LARGEST_KL", limit)
    after = quantised(source, tmp_path / "after", "int4")
    assert after.self_text_kl <= limit < before.self_text_kl
    assert 0 < after.eight_bit_matrices <= after.matrices
    assert before.weight_bytes < after.weight_bytes


MODULE = "model.layers.1.mlp.gate_proj"
DOWN, UP = f"{MODULE}.down", f"{MODULE}.up"


@pytest.mark.parametrize("steps", [[{UP}], [{UP}, {DOWN}], [{DOWN}, {UP}], [{UP, DOWN}]])
def test_a_widened_pair_is_balanced(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[set[str]],
) -> None:
    """In rows of 8 bits it has less error than in 4, and than in 8 bits without balancing."""
    student = skewed_student(tmp_path / "student", tiny_tokenizer)
    full, half = (lowered(student, tmp_path / p, "standard", p) for p in ("fp32", "fp16"))
    down_DR, up_RE = stored(full, DOWN), stored(full, UP)

    def error_of(widened: list[set[str]]) -> float:
        waiting = [*map(frozenset, widened), frozenset()]
        monkeypatch.setattr("export.quantize_fit.Fit.to_widen", lambda *_: waiting.pop(0))
        directory = tmp_path / f"q{len(widened)}"
        text_BT = np.random.default_rng(0).integers(3, 300, (6, 16))
        result = quantised(full, directory, "int4", into=half, text_ids_BT=text_BT)
        assert result.eight_bit_matrices == sum(map(len, widened))
        product_DE = stored(directory, DOWN) @ stored(directory, UP)
        return float(np.linalg.norm(product_DE - down_DR @ up_RE))

    found = error_of(steps)
    assert found < 0.9 * error_of([])
    if set.union(*steps) == {UP, DOWN}:
        plain_DR, plain_RE = (
            quantised_blocks(w.T, 8, len(w), symmetric=True).dequantised().T
            for w in (down_DR, up_RE)
        )
        assert found < 0.9 * np.linalg.norm(plain_DR @ plain_RE - down_DR @ up_RE)


def skewed_student(directory: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """One module of rank 64, whose ranks weigh as unequally as singular values do."""
    model = build_tiny_model("llama")
    apply_structure(model, {MODULE: 64})
    module = model.get_submodule(MODULE)
    assert isinstance(module, FactoredLinear)
    generator = torch.Generator().manual_seed(3)
    module.down.weight.data.normal_(std=0.1, generator=generator)
    module.up.weight.data.normal_(generator=generator).mul_(10 ** -torch.linspace(0, 2, 64))
    return save_case(directory, model, tokenizer)


def stored(directory: Path, name: str) -> np.ndarray:
    """A matrix [K, N] of a graph of the standard flavour in float32, whatever it is stored in."""
    graph = onnx.load(directory / "model.onnx").graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    weight = next(node.input[1] for node in graph.node if node.name == name)
    if weight in tensors:
        return np.asarray(tensors[weight], np.float32)
    values_KN, scales = (tensors[n].astype(np.float32) for n in made[weight].input)
    if scales.ndim == 2:
        scales = scales.repeat(len(values_KN) // len(scales), 0)
    return np.asarray(values_KN * scales)


def test_the_worst_matrices_come_first() -> None:
    lost = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 1.0}
    assert worst(lost, 1.0) == []
    assert worst(lost, 0.5) == ["b"]
    assert worst(lost, 0.2) == ["b", "c"]
    assert worst(lost, 0.0) == ["b", "c", "a", "d"]
