"""Opening an exported directory: what runs is what was asked for, and nothing outside is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.artifact import UserError, write_manifest
from export.external_data import external_data_files
from export.ort_session import SessionSettings, open_session
from export.session import OrtModel

VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 11, 8, 2, 4
RNG = np.random.default_rng(0)
EMBEDDING_VD = RNG.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
HEAD_DV = RNG.normal(size=(HIDDEN, VOCABULARY)).astype(np.float32)


def toy_graph(float_type: int = TensorProto.FLOAT, keep: bool = True) -> onnx.ModelProto:
    """One layer by the IO contract: logits = head(embedding), cache = the embeddings."""
    node = helper.make_node
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["hidden"]),
        node("MatMul", ["hidden", "head"], ["every_logit"]),
        node("Reshape", ["hidden", "split"], ["BSHD"]),
        node("Transpose", ["BSHD"], ["BHSD"], perm=[0, 2, 1, 3]),
        node("Cast", ["BHSD"], ["new"], to=float_type),
        node("Concat", [cache[0], "new"], ["present.0.key"], axis=2),
        node("Concat", [cache[1], "new"], ["present.0.value"], axis=2),
    ]
    weights = {
        "embedding": EMBEDDING_VD,
        "head": HEAD_DV,
        "split": np.array([0, 0, HEADS, HEAD_DIM], np.int64),
    }
    last = "every_logit"
    if keep:
        weights |= {
            "logits_to_keep": np.array([2**31 - 1], np.int64),
            "end": np.array([2**62], np.int64),
            "axis": np.array([1], np.int64),
        }
        nodes.append(node("Neg", ["logits_to_keep"], ["start"]))
        nodes.append(node("Slice", [last, "start", "end", "axis"], ["kept"]))
        last = "kept"
    nodes.append(node("Cast", [last], ["logits"], to=float_type))
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        *(info(name, float_type, ["batch", HEADS, "past", HEAD_DIM]) for name in cache),
    ]
    outputs = [
        info("logits", float_type, ["batch", "kept", VOCABULARY]),
        info("present.0.key", float_type, ["batch", HEADS, "total", HEAD_DIM]),
        info("present.0.value", float_type, ["batch", HEADS, "total", HEAD_DIM]),
    ]
    if keep:
        inputs.append(info("logits_to_keep", TensorProto.INT64, [1]))
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write_toy(directory: Path, model: onnx.ModelProto | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    onnx.save(
        model or toy_graph(),
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=200,
    )
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    return directory


def set_location(directory: Path, location: str) -> None:
    """Point every external tensor of the model at `location`."""
    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message and ";" in message
    return message


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "onnx")


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids_BS = np.array([[1, 2, 3], [4, 5, 6]])
    return ids_BS, np.ones_like(ids_BS), np.arange(3)[None].repeat(2, 0)


def test_step_gives_logits_and_a_growing_cache(toy: Path) -> None:
    model = OrtModel.open(toy, threads=1)
    assert (model.layers, model.kv_heads, model.head_dim) == (1, HEADS, HEAD_DIM)
    assert (model.vocabulary, model.float_type, model.provider) == (VOCABULARY, np.float32, "cpu")
    ids_BS, mask_BT, positions_BS = sample()
    logits_BKV, cache = model.step(ids_BS, mask_BT, positions_BS)
    np.testing.assert_allclose(logits_BKV, EMBEDDING_VD[ids_BS] @ HEAD_DV, rtol=1e-5, atol=1e-6)
    assert [array.shape for array in cache] == [(2, HEADS, 3, HEAD_DIM)] * 2
    _, cache = model.step(ids_BS[:, :1], np.ones((2, 4)), positions_BS[:, :1] + 3, cache)
    assert cache[1].shape == (2, HEADS, 4, HEAD_DIM)
    np.testing.assert_array_equal(cache[0][:, :, 3], cache[0][:, :, 0])


@pytest.mark.parametrize("in_graph", [True, False])
def test_logits_of_the_last_positions_alone(tmp_path: Path, in_graph: bool) -> None:
    model = OrtModel.open(write_toy(tmp_path / "onnx", toy_graph(keep=in_graph)))
    assert model.has_logits_to_keep == in_graph
    every, _ = model.step(*sample())
    for count in (1, 2, 99):
        kept, _ = model.step(*sample(), logits_to_keep=count)
        np.testing.assert_array_equal(kept, every[:, -count:])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_types_go_in_and_out(tmp_path: Path, kind: int) -> None:
    model = OrtModel.open(write_toy(tmp_path / "onnx", toy_graph(kind)))
    expected = EMBEDDING_VD[sample()[0]] @ HEAD_DV
    logits_BKV, cache = model.step(*sample())
    assert cache[0].dtype == model.float_type
    np.testing.assert_allclose(logits_BKV.astype(np.float32), expected, atol=0.02)
    ids_BS, _, positions_BS = sample()
    logits_BKV, again = model.step(ids_BS, np.ones((2, 6)), positions_BS + 3, cache, 2)
    np.testing.assert_allclose(logits_BKV.astype(np.float32), expected[:, -2:], atol=0.02)
    np.testing.assert_array_equal(again[1][:, :, :3], cache[1])


def test_settings_reach_onnxruntime(toy: Path) -> None:
    model = OrtModel.open(toy, threads=2, spinning=False)
    options = model.session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_session_json_is_followed(toy: Path) -> None:
    saved = {"provider": "cpu", "threads": 1, "graph_optimization_level": "none"}
    (toy / "session.json").write_text(json.dumps(saved))
    options = OrtModel.open(toy).session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with pytest.raises(UserError, match="built for the cpu provider, asked for is cuda") as error:
        OrtModel.open(toy, provider="cuda")
    one_line(error)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "rocm"])
def test_an_absent_provider_is_refused(toy: Path, provider: str) -> None:
    with pytest.raises(UserError, match=provider) as error:
        OrtModel.open(toy, provider=provider)
    assert "cpu" in one_line(error)


def test_a_provider_that_does_not_start_is_refused(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu lists providers whose libraries are missing, and runs on the CPU instead."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    fallen_back = SimpleNamespace(
        get_providers=lambda: ["CPUExecutionProvider"], disable_fallback=lambda: None
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: fallen_back)
    with pytest.raises(UserError, match="cuda was asked for, but only CPUExecution") as error:
        OrtModel.open(toy, provider="cuda")
    assert "pip install" in one_line(error)


def test_a_graph_of_another_release_names_both(toy: Path) -> None:
    """Where the releases are the same, the file is suspected."""
    model = onnx.load(toy / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "OfALaterRelease"
    (toy / "model.onnx").write_bytes(model.SerializeToString())
    for made_with, said in (
        ("99.9.1", f"made for onnxruntime 99.9.1 .*by {onnxruntime.__version__}, which .*OfALater"),
        (onnxruntime.__version__, "needs an intact ONNX model"),
    ):
        measured = {"onnxruntime": made_with}
        write_manifest(toy, kind="engine-ort", parent=None, argv=[], seed=0, measured=measured)
        with pytest.raises(UserError, match=said) as error:
            OrtModel.open(toy)
        one_line(error)


def test_no_onnxruntime(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install") as error:
        OrtModel.open(toy)
    one_line(error)


@pytest.mark.parametrize("threads", [0, -1, "two"])
def test_wrong_threads(toy: Path, threads: Any) -> None:
    with pytest.raises(UserError, match="whole number") as error:
        OrtModel.open(toy, threads=threads)
    one_line(error)


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../secret", "a/../../secret", "..", "", "C:\\x", "a\\..\\b"]
)
def test_external_data_outside_the_directory(toy: Path, location: str) -> None:
    (toy.parent / "secret").write_bytes(b"\0" * 4096)
    set_location(toy, location)
    with pytest.raises(UserError, match="keeps weights in") as error:
        OrtModel.open(toy)
    one_line(error)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_external_data_behind_a_link(toy: Path, link: str) -> None:
    data, outside = toy / "model.onnx.data", toy.parent / "outside"
    outside.mkdir()
    data.rename(outside / data.name)
    if link == "file":
        data.symlink_to(outside / data.name)
    else:
        (toy / "sub").symlink_to(outside)
        set_location(toy, f"sub/{data.name}")
    with pytest.raises(UserError, match="is a link") as error:
        OrtModel.open(toy)
    one_line(error)


def test_external_data_wherever_a_tensor_may_stand(tmp_path: Path) -> None:
    """Initializers, attributes of nodes, subgraphs and functions are all looked at."""

    def outside(location: str) -> onnx.TensorProto:
        tensor = TensorProto(name=location, dims=[1], data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        return tensor

    constant = helper.make_node("Constant", [], ["c"], value=outside("attribute"))
    inner = helper.make_graph([], "inner", [], [], [outside("subgraph")])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([constant, branch], "g", [], [], [outside("initializer")])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("sparse"))
    function = helper.make_function(
        "own", "F", [], [], [helper.make_node("Constant", [], ["d"], value=outside("function"))], []
    )
    model = helper.make_model(graph, functions=[function])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    names = ("attribute", "function", "initializer", "sparse", "subgraph")
    for name in names:
        (tmp_path / name).write_bytes(b"\0\0\0\0")
    assert external_data_files(path) == tuple(tmp_path / name for name in names)
    for name in names:
        (tmp_path / name).rename(tmp_path / "aside")
        with pytest.raises(UserError, match=f"{name}', which is missing"):
            external_data_files(path)
        (tmp_path / "aside").rename(tmp_path / name)


@pytest.mark.parametrize("fault", ["empty", "cut", "text", "missing", "no data", "short data"])
def test_damaged_files(toy: Path, fault: str) -> None:
    model, data = toy / "model.onnx", toy / "model.onnx.data"
    whole = model.read_bytes()
    if fault == "empty":
        model.write_bytes(b"")
    elif fault == "cut":
        model.write_bytes(whole[: len(whole) // 2])
    elif fault == "text":
        model.write_text("<html>404 not found</html>")
    elif fault == "missing":
        model.unlink()
    elif fault == "no data":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:32])
    with pytest.raises(UserError) as error:
        OrtModel.open(toy)
    assert "model.onnx" in one_line(error)


def test_an_altered_file_is_found_by_its_hash(toy: Path) -> None:
    write_manifest(toy, kind="onnx", parent=None, argv=[], seed=0, measured={})
    OrtModel.open(toy)
    data = toy / "model.onnx.data"
    altered = bytearray(data.read_bytes())
    altered[5] ^= 1
    data.write_bytes(altered)
    with pytest.raises(UserError, match="sha256"):
        OrtModel.open(toy)
    OrtModel.open(toy, verify=False)


def test_another_graph_is_refused(toy: Path) -> None:
    model = onnx.load(toy / "model.onnx")
    model.graph.output[1].name = "present.0.k"
    model.graph.node[5].output[0] = "present.0.k"
    write_toy(toy, model)
    with pytest.raises(UserError, match="needs input_ids") as error:
        OrtModel.open(toy)
    one_line(error)


def test_types_without_kernels_are_named(toy: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["b"])],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.BFLOAT16, [1])],
        [helper.make_tensor_value_info("b", TensorProto.BFLOAT16, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, toy / "model.onnx")
    with pytest.raises(UserError, match="bfloat16 needs a GPU provider") as error:
        OrtModel.open(toy)
    one_line(error)


def test_the_optimised_graph_can_be_saved(toy: Path) -> None:
    saved = toy.parent / "optimised"
    saved.mkdir()
    open_session(
        toy / "model.onnx", SessionSettings(threads=1), save_optimised=saved / "model.onnx"
    )
    (saved / "config.json").write_bytes((toy / "config.json").read_bytes())
    expected, _ = OrtModel.open(toy).step(*sample())
    got, _ = OrtModel.open(saved).step(*sample())
    np.testing.assert_array_equal(got, expected)


def test_neither_torch_nor_onnx_is_imported() -> None:
    """Bare devices have numpy and onnxruntime; the twin shows that the check sees an import."""
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'rich'): sys.modules[name] = None\n"
        "import {}\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for module, status in (("export.session", 0), ("distill.student_format", 1)):
        command = [sys.executable, "-c", script.format(module)]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == status, run.stderr
