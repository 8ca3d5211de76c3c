"""Real TensorRT-RTX builds of tiny decoders, without a GPU; no engine runs here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distill.artifact import UserError, open_artifact
from distill.modeling_budgeted import apply_structure
from distill.teacher import load_teacher
from export.engine_trt import EngineReport, build_engine
from export.lower import lower, save_onnx
from export.trt_api import BuildError
from export.trt_builder import BuildSettings, engine_from_onnx
from export.trt_check import check_engine
from export.trt_onnx import Limits, prepare_onnx, profiles_of
from export.trt_plain import write_plain
from tests.parity.lower_cases import save_case, student_model
from tests.trt_models import CONTEXT, LAYERS, VOCABULARY, seal, write_decoder

trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
TWO = ("sm86", "sm89")
MOST_OF_DENSE_BYTES = 0.45
LIMITS = {"max_batch": 2, "max_seq": 32, "max_past": 64, "workspace_bytes": 2**28}


@pytest.fixture(scope="module")
def onnx_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("run") / "onnx" / "standard-fp16")


@pytest.fixture(scope="module")
def engine(onnx_directory: Path) -> tuple[Path, EngineReport]:
    directory = onnx_directory.parents[1] / "engine-trt" / "fp16"
    return directory, build(onnx_directory, directory, targets=TWO)


def build(source: Path, directory: Path, **changes: Any) -> EngineReport:
    options: dict[str, Any] = {**LIMITS, "targets": ("sm89",), "argv": ["test"], **changes}
    return build_engine(source, directory, **options)


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "build.json").read_text())


def test_one_engine_for_two_gpu_generations(
    engine: tuple[Path, EngineReport], onnx_directory: Path
) -> None:
    directory, report = engine
    manifest = open_artifact(directory, "engine-trt")
    record = record_of(directory)
    assert record["targets"] == manifest["measured"]["targets"] == list(TWO)
    assert (record["flavour"], record["version"]) == ("tensorrt_rtx", trt.__version__)
    size_bytes = (directory / "model.engine").stat().st_size
    assert size_bytes == record["engine"]["bytes"] == report.engine_bytes > 0
    assert record["build_seconds"] > 0 and record["peak_host_bytes"] > 2**20
    source = open_artifact(onnx_directory, "onnx")
    assert (
        record["onnx"]["files"]["model.onnx.data"]["sha256"]
        == (source["files"]["model.onnx.data"]["sha256"])
    )
    assert (directory / "tokenizer.json").is_file(), "an engine is deployed with its tokenizer"
    assert not (directory / "model.onnx").exists()


def test_the_record_describes_inputs_outputs_and_layers(engine: tuple[Path, Any]) -> None:
    record = record_of(engine[0])
    inputs = {tensor["name"]: tensor for tensor in record["inputs"]}
    assert inputs["input_ids"]["dtype"] == "int64"
    assert inputs["past_key_values.1.value"]["dtype"] == "float16"
    assert inputs["past_key_values.1.value"]["shape"] == [-1, 2, -1, 16]
    outputs = {tensor["name"]: tensor for tensor in record["outputs"]}
    assert outputs["logits"]["shape"] == [-1, -1, VOCABULARY]
    assert outputs["logits"]["dtype"] == "float16", "strongly typed: the ONNX's own type"
    products = [layer for layer in record["layers"] if layer["type"] == "MATRIX_MULTIPLY"]
    assert len(products) == 7 * LAYERS + 1, "low, q, k, v, scores, values and output; the head"
    assert all(layer["outputs"][0][0] == "float16" for layer in products)


def test_the_head_is_computed_for_as_many_positions_as_a_call_asks(
    engine: tuple[Path, Any],
) -> None:
    record = record_of(engine[0])
    keep = next(t for t in record["inputs"] if t["name"] == "logits_to_keep")
    assert keep["memory"] == "host", "a shape tensor: TensorRT reads it on the host"
    values = [record["profiles"][name]["logits_to_keep"] for name in ("prefill", "decode")]
    assert values[0] == {"min": [1], "opt": [1], "max": [LIMITS["max_seq"]]}
    assert values[1] == {"min": [1], "opt": [1], "max": [1]}


@pytest.mark.parametrize("logits", ["last", "all"])
def test_logits_can_be_built_in(onnx_directory: Path, tmp_path: Path, logits: Any) -> None:
    build(onnx_directory, tmp_path / "engine", logits=logits)
    record = record_of(tmp_path / "engine")
    assert record["logits"] == logits
    assert "logits_to_keep" not in {tensor["name"] for tensor in record["inputs"]}


def test_single_precision_stays_single(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "onnx", precision="fp32")
    build(source, tmp_path / "engine")
    record = record_of(tmp_path / "engine")
    assert record["precision"] == "fp32"
    assert {tensor["dtype"] for tensor in record["outputs"]} == {"float32"}


def test_turing_is_left_out_where_tensorrt_rtx_cannot_build_for_it(tmp_path: Path) -> None:
    """The rule of `trt_targets.lacking` is what TensorRT-RTX itself says."""
    source = write_decoder(tmp_path / "onnx", precision="fp32")
    report = build(source, tmp_path / "engine", targets=None)
    assert "sm75" not in report.place.here and len(report.place.here) == 5
    path, prepared = source / "model.onnx", prepare_onnx(source, "input")
    profiles = profiles_of(prepared.inputs, Limits(1, 8, 8))
    settings = BuildSettings("tensorrt_rtx", profiles, targets=("sm75",))
    with pytest.raises(BuildError, match="FP32 GEMM is not supported"):
        engine_from_onnx(trt, prepared.onnx_bytes, path, settings, lambda share, phase: None)


def test_limits_are_cut_to_the_context(onnx_directory: Path, tmp_path: Path) -> None:
    build(onnx_directory, tmp_path / "engine", max_seq=10_000, max_past=10_000)
    record = record_of(tmp_path / "engine")
    assert record["limits"] == {"max_batch": 2, "max_seq": CONTEXT, "max_past": CONTEXT - 1}
    assert record["profiles"]["prefill"]["attention_mask"]["max"] == [2, 2 * CONTEXT - 1]


def test_a_rejected_node_is_named_in_one_line(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "onnx", unsupported="GroupQueryAttention")
    with pytest.raises(UserError, match=r"/unsupported \(GroupQueryAttention\)") as caught:
        build(source, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists(), "nothing half-written"


def test_a_damaged_onnx_is_refused(onnx_directory: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(onnx_directory, tmp_path / "onnx"))
    data = (source / "model.onnx").read_bytes()
    (source / "model.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="model.onnx"):
        build(source, tmp_path / "engine")
    seal(source)  # even where the manifest agrees with the damage
    with pytest.raises(UserError, match="model.onnx"):
        build(source, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_family_lowers_to_an_engine(
    family: str, precision: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """fp32 attention has no fused kernel, so this also proves that attention is decomposed."""
    student = save_case(tmp_path / "student", student_model(family, "factored"), tiny_tokenizer)
    source = lowered_source(student, tmp_path / "onnx", precision)
    build(source, tmp_path / "engine")
    record = record_of(tmp_path / "engine")
    graph = onnx.load_model(source / "model.onnx", load_external_data=False).graph
    nodes = [node.op_type for node in graph.node]
    kinds = [layer["type"] for layer in record["layers"]]
    assert kinds.count("ATTENTION_INPUT") == nodes.count("Attention") > 0
    products = nodes.count("MatMul") + nodes.count("Gemm")
    assert kinds.count("MATRIX_MULTIPLY") == products, "nothing added, nothing lost"
    dtypes = {tensor["dtype"] for tensor in record["outputs"]}
    assert dtypes == {"float16" if precision == "fp16" else "float32"}


def test_plain_operators_build_too(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What older TensorRT gets; float32 nowhere but in norms, softmax and positions."""
    student = save_case(tmp_path / "student", student_model(family, "factored"), tiny_tokenizer)
    source = lowered_source(student, tmp_path / "onnx", "fp16")
    write_plain(source, source)
    seal(source, flavour="plain")
    build(source, tmp_path / "engine")
    layers = record_of(tmp_path / "engine")["layers"]
    products = [layer for layer in layers if layer["type"] == "MATRIX_MULTIPLY"]
    assert all(layer["outputs"][0][0] == "float16" for layer in products)
    softmaxes = [layer for layer in layers if layer["type"] == "SOFTMAX"]
    assert softmaxes and all(layer["outputs"][0][0] == "float32" for layer in softmaxes)


def test_an_engine_is_refused_elsewhere(engine: tuple[Path, Any], onnx_directory: Path) -> None:
    directory, version = engine[0], trt.__version__
    record = check_engine(directory, "sm86", version, onnx_directory=onnx_directory)
    assert record["targets"] == list(TWO)
    with pytest.raises(UserError, match="--target sm120"):
        check_engine(directory, "sm120", version)
    with pytest.raises(UserError, match=r"here is 1\.0\.0"):
        check_engine(directory, "sm86", "1.0.0")


@pytest.mark.parametrize("kind", ["kit", "both"])
def test_the_kit_builds_with_nothing_but_tensorrt(
    onnx_directory: Path, tmp_path: Path, kind: str
) -> None:
    """Built here by TensorRT-RTX in a bare process; on a device TensorRT runs the same code."""
    targets = ("sm87",) if kind == "kit" else ("sm87", "sm86")
    build(onnx_directory, tmp_path / "engine", targets=targets)
    kit = tmp_path / "engine" if kind == "kit" else tmp_path / "engine" / "device"
    assert not (kit / "model.engine").exists()
    retarget(kit, ["sm86", "sm89"])
    moved = Path(shutil.copytree(kit, tmp_path / "elsewhere" / "kit"))
    done = bare(moved, "--flavour", "tensorrt_rtx")
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "onnx", "distill", "psutil", "transformers"}
    record = check_engine(moved, "sm89", trt.__version__)
    assert record["targets"] == ["sm86", "sm89"] and record["precision"] == "fp16"
    assert (moved / "tokenizer.json").is_file()


def test_an_altered_kit_is_refused(onnx_directory: Path, tmp_path: Path) -> None:
    build(onnx_directory, tmp_path / "kit", targets=("sm87",))
    retarget(tmp_path / "kit", ["sm86"])
    weights = bytearray((tmp_path / "kit" / "model.onnx.data").read_bytes())
    weights[100] ^= 1
    (tmp_path / "kit" / "model.onnx.data").write_bytes(weights)
    done = bare(tmp_path / "kit", "--flavour", "tensorrt_rtx")
    assert done.returncode == 2
    assert "model.onnx.data is not the file" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "kit" / "model.engine").exists()


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2])
def test_an_interrupt_ends_a_build_and_leaves_nothing(
    onnx_directory: Path, tmp_path: Path, delay_s: float
) -> None:
    """Whether it comes before, in or after parsing: an unguarded callback would abort (-6)."""
    code = (
        "import sys; from pathlib import Path\n"
        "from export.engine_trt import build_engine\n"
        "try:\n"
        f"    build_engine(Path({str(onnx_directory)!r}), Path({str(tmp_path / 'engine')!r}),\n"
        f"                 targets=None, argv=[], **{LIMITS!r})\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "TensorRT-RTX engine for sm75 sm80 sm86 sm89 sm120 sm121" in first
    threading.Timer(delay_s, process.send_signal, [signal.SIGINT]).start()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_polygraphy_reads_what_tensorrt_gets(onnx_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    build(onnx_directory, tmp_path / "kit", targets=("sm87",))
    command = ["inspect", "model", str(tmp_path / "kit" / "model.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", "from polygraphy.tools import main; main()", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "logits_to_keep [dtype=int64, shape=(1,)]" in done.stdout


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_at_a_quarter_of_its_compute_takes_less_than_half_the_bytes(
    tmp_path: Path,
) -> None:
    """Embedding and head included, all six targets; what the weights are does not matter here."""
    teacher = load_teacher("smollm2-135m", dtype=torch.float32)
    engine_bytes = []
    for name, share in (("dense", 1.0), ("quarter", 0.25)):
        if share < 1:
            apply_structure(teacher.model, quarter_ranks(teacher.model))
        student = save_case(tmp_path / name, teacher.model, teacher.tokenizer)
        source = lowered_source(student, tmp_path / f"{name}-onnx", "fp16")
        report = build(source, tmp_path / f"{name}-engine", targets=None)
        assert len(report.place.here) == 6
        engine_bytes.append(report.engine_bytes)
    assert engine_bytes[1] <= MOST_OF_DENSE_BYTES * engine_bytes[0]


def quarter_ranks(model: torch.nn.Module) -> dict[str, int]:
    """The rank, a multiple of 32, with which each target module spends a quarter of its MACs."""
    return {
        name: max(module.weight.numel() // (4 * sum(module.weight.shape)) // 32, 1) * 32
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, torch.nn.Linear)
    }


def lowered_source(student: Path, directory: Path, precision: Any) -> Path:
    """An "onnx" artefact of a student that has no manifest."""
    directory.mkdir()
    save_onnx(lower(student, flavour="standard", precision=precision), directory)
    shutil.copyfile(student / "config.json", directory / "config.json")
    seal(directory, precision=precision)
    return directory


def retarget(kit: Path, targets: list[str]) -> None:
    """Mean the kit for GPUs that TensorRT-RTX can build for without having them."""
    description = json.loads((kit / "kit.json").read_text())
    description["targets"] = targets
    (kit / "kit.json").write_text(json.dumps(description))


def bare(kit: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run build.py where only TensorRT-RTX can be imported; stdout ends with what was loaded."""
    packages = kit.parent / "packages"
    packages.mkdir(exist_ok=True)
    home = Path(trt.__file__).parents[1]
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        if not (packages / name).exists():
            (packages / name).symlink_to((home / name).resolve())
    code = (
        "import json, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{kit}:{packages}"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code, str(kit / "build.py"), *flags],
        cwd=kit.parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
