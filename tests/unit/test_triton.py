"""The model repository for Triton, read with Triton's own schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.__main__ import main
from deploy.triton_config import written
from distill.artifact import write_manifest
from export.session import IN_PLACE
from tests.trt_models import write_decoder

text_format = pytest.importorskip("google.protobuf.text_format")
schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")

LAYERS = 2


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder's onnx directory, with a tokenizer file."""
    directory = write_decoder(tmp_path_factory.mktemp("run") / "onnx" / "standard-fp16")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def engine(graph: Path, tmp_path: Path) -> Path:
    """An engine of TensorRT as build.json describes it; the engine's bytes are not looked at."""
    directory = tmp_path / "run" / "engine-trt" / "fp16"
    directory.mkdir(parents=True)
    shutil.copyfile(graph / "config.json", directory / "config.json")
    (directory / "model.engine").write_bytes(b"engine")
    write_record(directory, with_keep=True)
    return directory


def write_record(directory: Path, *, with_keep: bool, flavour: str = "tensorrt") -> None:
    def entry(name: str, dtype: str, shape: list[int], memory: str = "device") -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": shape, "memory": memory}

    ids = [entry(n, "int64", [-1, -1]) for n in ("input_ids", "attention_mask", "position_ids")]
    parts = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    past = [entry(f"past_key_values.{part}", "float16", [-1, 2, -1, 16]) for part in parts]
    keep = [entry("logits_to_keep", "int64", [1], "host")] if with_keep else []
    present = [entry(f"present.{part}", "float16", [-1, 2, -1, 16]) for part in parts]
    record = {
        "flavour": flavour,
        "limits": {"max_batch": 4, "max_seq": 32, "max_past": 64},
        "profiles": {"prefill": {}, "decode": {}},
        "inputs": [*ids, *past, *keep],
        "outputs": [entry("logits", "float16", [-1, -1, 64]), *present],
    }
    (directory / "build.json").write_text(json.dumps(record))
    write_manifest(directory, kind="engine-trt", parent=None, argv=[], seed=0, measured={})


def config_of(out: Path, name: str = "student") -> Any:
    """config.pbtxt through Triton's protobuf, which refuses what it does not know."""
    config = schema.ModelConfig()
    text_format.Parse((out / "repository" / name / "config.pbtxt").read_text(), config)
    return config


def write(source: Path, out: Path, *flags: str) -> Any:
    assert main(["triton", "--run", str(source), str(out), *flags]) == 0
    return config_of(out)


def shapes(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        tensor.name: (schema.DataType.Name(tensor.data_type), list(tensor.dims))
        for tensor in tensors
    }


def test_an_onnx_with_every_tensor_of_its_graph(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = write(graph, out, "--max-batch", "16", "--max-delay-ms", "2.5", "--instances", "2")
    assert (config.name, config.backend, config.max_batch_size) == ("student", "onnxruntime", 16)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    group = config.instance_group[0]
    assert group.count == 2 and group.kind == schema.ModelInstanceGroup.KIND_CPU
    inputs, outputs = shapes(config.input), shapes(config.output)
    assert inputs["input_ids"] == ("TYPE_INT64", [-1])
    assert inputs["past_key_values.1.value"] == ("TYPE_FP16", [2, -1, 16])
    assert outputs["logits"] == ("TYPE_FP16", [-1, 64])
    assert len(inputs) == 3 + 2 * LAYERS and len(outputs) == 1 + 2 * LAYERS
    assert "logits_to_keep" not in inputs


def test_the_repository_holds_a_model_that_loads(graph: Path, tmp_path: Path) -> None:
    """Names and shapes are those that ONNX Runtime itself reports for the copied files."""
    import onnxruntime

    out = tmp_path / "out"
    config = write(graph, out)
    version = out / "repository" / "student" / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(
        version / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for ours, theirs in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [tensor.name for tensor in ours] == [tensor.name for tensor in theirs]
        for tensor, real in zip(ours, theirs, strict=True):
            sizes = [size if isinstance(size, int) else -1 for size in real.shape]
            assert [-1, *tensor.dims] == sizes
    feed = {
        tensor.name: np.zeros([1, *(max(d, 1) for d in tensor.dims)], np.float16)
        if tensor.name.startswith("past")
        else np.ones((1, 2 if tensor.name == "attention_mask" else 1), np.int64)
        for tensor in config.input
    }
    assert session.run(["logits"], feed)[0].shape == (1, 1, 64)
    assert (out / "text" / "tokenizer.json").is_file()
    assert not (out / "repository" / "student" / "1" / "tokenizer.json").exists()


def test_accelerated_and_threaded_variants(graph: Path, tmp_path: Path) -> None:
    fast = write(graph, tmp_path / "fast", "--accelerate")
    accelerators = fast.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == ["tensorrt"]
    assert fast.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    few = write(graph, tmp_path / "few", "--threads", "3")
    assert few.parameters["intra_op_thread_count"].string_value == "3"


def test_an_engine_with_a_shape_tensor_is_not_batched(engine: Path, tmp_path: Path) -> None:
    config = write(engine, tmp_path / "out", "--max-batch", "8")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 0)
    assert not config.HasField("dynamic_batching")
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    inputs = {tensor.name: tensor for tensor in config.input}
    assert inputs["logits_to_keep"].is_shape_tensor and list(inputs["logits_to_keep"].dims) == [1]
    assert list(inputs["input_ids"].dims) == [-1, -1]
    assert not inputs["input_ids"].is_shape_tensor
    plan = tmp_path / "out" / "repository" / "student" / "1" / config.default_model_filename
    assert plan.read_bytes() == b"engine"
    assert "batching is off" in (tmp_path / "out" / "README.md").read_text()


def test_an_engine_without_one_is_batched_up_to_its_profile(engine: Path, tmp_path: Path) -> None:
    write_record(engine, with_keep=False)
    config = write(engine, tmp_path / "out", "--max-batch", "8")
    assert config.max_batch_size == 4
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert [list(t.dims) for t in config.input if t.name == "input_ids"] == [[-1]]


def test_the_schema_refuses_what_it_does_not_know() -> None:
    """Twin of the tests above: a misspelt field or kind does not pass."""
    for wrong in ({"max_batchsize": 1}, {"instance_group": [{"kind": "KIND_TPU"}]}):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(written(wrong), schema.ModelConfig())


def test_kserve_names_the_model_and_its_resource(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        main(["triton", "--run", str(graph), "--name", "My_Model", str(out), "--kind", "gpu"]) == 0
    )
    page = (out / "kserve.yaml").read_text()
    assert "name: my-model\n" in page and "nvidia.com/gpu: 1" in page


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--name", "a/b"], "--name a/b"),
        (["--max-batch", "0"], "--max-batch 0"),
        (["--accelerate", "--kind", "cpu"], "--accelerate and --kind cpu"),
    ],
)
def test_wrong_flags(
    graph: Path, tmp_path: Path, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["triton", "--run", str(graph), str(out), *flags]) == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_engines_that_do_not_fit(
    graph: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["triton", "--run", str(engine), str(out), "--kind", "cpu"]) == 2
    write_record(engine, with_keep=True, flavour="tensorrt_rtx")
    assert main(["triton", "--run", str(engine), str(out)]) == 2
    assert "tensorrt_rtx" in capsys.readouterr().err
    damaged = Path(shutil.copytree(graph, tmp_path / "damaged"))
    model = onnx.load_model(damaged / "model.onnx", load_external_data=False)
    (damaged / "model.onnx").write_bytes(model.SerializeToString()[:-3])
    assert main(["triton", "--run", str(damaged), str(out)]) == 2
    assert not out.exists()


def test_a_graph_for_one_release_gives_way_to_the_one_it_was_made_from(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    engine = Path(shutil.copytree(graph, run / "engine-ort" / "fp16-cpu"))
    model = onnx.load_model(engine / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, {IN_PLACE: "1"})
    model.producer_name = "in place"
    (engine / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(engine, kind="engine-ort", parent=None, argv=[], seed=0, measured={})
    assert main(["triton", "--run", str(run), str(out)]) == 2
    said = capsys.readouterr().err
    assert "onnx/ort-fp16" in said and said.count("\n") == 1 and not out.exists()
    exported = Path(shutil.copytree(graph, run / "onnx" / "ort-fp16"))
    write(run, out)
    copied = out / "repository" / "student" / "1" / "model.onnx" / "model.onnx"
    assert copied.read_bytes() == (exported / "model.onnx").read_bytes()
    assert "onnx/ort-fp16" in (out / "README.md").read_text()


def test_an_existing_directory_is_kept(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert main(["triton", "--run", str(graph), str(out)]) == 2
    assert (out / "mine").exists()
    assert main(["triton", "--run", str(graph), str(out), "--overwrite"]) == 0
    assert not (out / "mine").exists()
