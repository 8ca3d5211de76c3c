"""``python -m export`` from a student to engines that run, and what it says to mistakes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distill.artifact import open_artifact, read_json
from export.session import OrtModel
from export.trt_plain import PARSED
from tests.e2e.export_runs import call, finished_directories, reseal, write_student
from tests.e2e.faults import Ended, assert_refused, file_size_limit, leftovers

Capture = pytest.CaptureFixture[str]
NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
needs_rtx = pytest.mark.skipif(NO_RTX, reason="needs the extra rtx")
CPU_PRECISIONS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return write_student(tmp_path_factory.mktemp("pristine") / "run", tiny_tokenizer)


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A run folder with a student alone."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture(scope="module")
def exported(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an fp32 graph and engine, for reading only."""
    from export.__main__ import main

    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("exported") / "run"))
    torch.set_num_threads(1)
    assert main(["--run", str(folder), "--precision", "fp32"]) == 0
    return folder


def export(capsys: Capture, run: Path, *flags: str) -> Ended:
    return call(capsys, "--run", str(run), *flags)


def test_every_precision_of_onnx_runtime(run: Path, capsys: Capture) -> None:
    ended = export(capsys, run, "--all")
    assert ended.status == 0, ended.err
    engines = {f"engine-ort/{precision}-cpu" for precision in CPU_PRECISIONS}
    graphs = {f"onnx/ort-{precision}" for precision in CPU_PRECISIONS}
    assert finished_directories(run) == {"student", *engines, *graphs}
    rows = [line for line in ended.out.splitlines() if line.startswith("engine-ort/")]
    assert {row.split()[0] for row in rows} == engines
    assert all("13/4/1" in row for row in rows), "kept, factored and removed modules"
    assert f"--run {run} --engine engine-ort/int4-cpu" in ended.out
    sizes = []
    for precision in CPU_PRECISIONS:
        directory = run / "engine-ort" / f"{precision}-cpu"
        measured = open_artifact(directory, "engine-ort")["measured"]
        assert measured["parity"]["greedy_steps"] == 64
        assert measured["max_logit_difference_to_onnx"] >= 0
        assert {"tokenizer.json", "genai_config.json", "plan.json", "session.json"} <= {
            path.name for path in directory.iterdir()
        }
        graph = open_artifact(run / "onnx" / f"ort-{precision}", "onnx")["measured"]
        assert graph["parity"]["perplexity_ratio"] > 0
        sizes.append(graph["weight_bytes"])
        ids_BS = np.array([[5, 17, 90]])
        logits, _ = OrtModel.open(directory).step(ids_BS, np.ones_like(ids_BS), np.arange(3)[None])
        assert logits.shape == (1, 3, 384)
    assert sizes == sorted(sizes, reverse=True)


@needs_rtx
def test_every_precision_of_tensorrt(run: Path, capsys: Capture) -> None:
    """TensorRT-RTX takes every graph as it is, quantised ones too."""
    ended = export(capsys, run, "--engine", "trt", "--all", "--target", "sm89")
    assert ended.status == 0, ended.err
    for precision in ("fp32", "fp16", "bf16", "int8", "int4"):
        record = read_json(run / "engine-trt" / precision / "build.json")
        assert (record["precision"], record["targets"]) == (precision, ["sm89"])
        graph = open_artifact(run / "onnx" / f"standard-{precision}")["measured"]
        assert graph["parity"]["arithmetic"] == ("fp32" if precision == "bf16" else precision)


@needs_rtx
def test_a_kit_for_a_device(run: Path, capsys: Capture) -> None:
    flags = ("--engine", "trt", "--precision", "fp16", "--target", "sm87,sm86")
    ended = export(capsys, run, *flags)
    assert ended.status == 0, ended.err
    assert (run / "engine-trt/fp16/device/build.py").is_file()
    assert "python3 build.py" in ended.out
    graphs = {path.name for path in (run / "onnx").iterdir()}
    assert graphs == {"standard-fp16", "plain-fp16"}, "TensorRT-RTX keeps the standard graph"
    assert_plain(run / "engine-trt/fp16/device", opset=19)


@pytest.mark.parametrize(("precision", "opset"), [("int8", 19), ("int4", 21)])
def test_a_kit_in_integers(run: Path, capsys: Capture, precision: str, opset: int) -> None:
    flags = ("--engine", "trt", "--precision", precision, "--target", "sm87,sm110")
    ended = export(capsys, run, *flags)
    assert ended.status == 0, ended.err
    proof = open_artifact(run / "onnx" / f"plain-{precision}")["measured"]
    assert proof["flavour"] == "plain" and proof["parity"]["tokens"] > 0
    assert_plain(run / "engine-trt" / precision, opset)
    readme = (run / "engine-trt" / precision / "README.md").read_text()
    assert "Jetson Orin's JetPack brings 10.3; Jetson Thor's JetPack brings 10.13" in readme


def assert_plain(kit: Path, opset: int) -> None:
    """What TensorRT 10.3 parses, by its documentation."""
    model = onnx.load_model(kit / "model.onnx", load_external_data=False)
    assert {node.op_type for node in model.graph.node} <= PARSED
    assert model.opset_import[0].version == opset
    assert read_json(kit / "kit.json")["first_release"] == [10, 0]


def test_what_is_finished_is_kept(exported: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("manifest.json")}
    ended = export(capsys, exported, "--precision", "fp32")
    assert ended.status == 0 and "is used as it is" in ended.err
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("manifest.json")} == before


def test_another_student_or_another_text_is_exported_anew(
    exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    text = tmp_path / "text.txt"
    text.write_text("The river rises in the hills above the old town. " * 40)
    ended = export(capsys, run, "--precision", "fp32", "--parity-text", str(text))
    assert ended.status == 0 and "built with parity_text_sha256" in ended.err
    reseal(run / "student")
    ended = export(capsys, run, "--precision", "fp32", "--parity-text", str(text))
    assert ended.status == 0 and "was made from an earlier parent" in ended.err
    parent = open_artifact(run / "onnx" / "ort-fp32")["parent"]
    assert ended.err.count("lowering") == 1
    export(capsys, run, "--precision", "fp32", "--overwrite")
    assert open_artifact(run / "onnx" / "ort-fp32")["parent"] == parent


@needs_rtx
def test_an_engine_for_other_gpus_or_sizes_is_built_anew(run: Path, capsys: Capture) -> None:
    flags = ("--engine", "trt", "--precision", "fp16", "--max-seq", "16", "--max-past", "16")
    record = run / "engine-trt" / "fp16" / "build.json"
    for more, said in (
        (("--target", "sm86"), ""),
        (("--target", "sm86"), "engine-trt/fp16 is finished and is used as it is"),
        (("--target", "sm89"), "built with targets ['sm86'], now ['sm89']"),
        (("--target", "sm89", "--max-batch", "2"), "built with limits"),
    ):
        ended = export(capsys, run, *flags, *more)
        assert ended.status == 0 and said in ended.err
        assert read_json(record)["targets"] == [more[1]]
    assert read_json(record)["limits"]["max_batch"] == 2


def test_the_newest_run_is_the_default(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "one")
    monkeypatch.chdir(run.parent)
    assert call(capsys, "--precision", "fp32").status == 0
    assert (run.parent / "runs/one/engine-ort/fp32-cpu/manifest.json").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "onnx"], ["--engine onnx: allowed is ort trt"]),
        (["--precision", "fp8"], ["--precision fp8: allowed is fp32"]),
        (["--precision", "bf16"], ["CPU provider", "fp32 fp16 int8 int4"]),
        (["--provider", "rocm"], ["--provider rocm: allowed is cpu | cuda"]),
        (["--provider", "cuda"], ["provider cuda", "cpu", "pip install"]),
        (["--target", "sm86"], ["--target belongs to TensorRT"]),
        (["--engine", "trt", "--target", "sm42"], ["sm42", "sm86", "sm87"]),
        (["--engine", "trt", "--precision", "bf16", "--target", "sm75"], ["sm75", "bfloat16"]),
        (["--all", "--precision", "int8"], ["--all and --precision"]),
        (["--max-seq", "0", "--max-batch", "x"], ["--max-seq 0", "--max-batch x"]),
        (["--workspace-gib", "nan"], ["--workspace-gib nan: allowed is a number above 0"]),
        (["--quick"], ["--quick: no such flag"]),
        (["--parity-text", "nowhere.txt"], ["--parity-text nowhere.txt", "UTF-8"]),
    ],
)
def test_wrong_flags(flags: list[str], words: list[str], run: Path, capsys: Capture) -> None:
    assert_refused(export(capsys, run, *flags), *words)
    assert finished_directories(run) == {"student"} and leftovers(run) == []


@pytest.mark.parametrize("module", ["tensorrt_rtx", "onnxruntime"])
def test_an_absent_runtime_is_named_before_any_work(
    module: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(export(capsys, run, "--engine", "trt"), module, "pip install")
    assert not (run / "onnx").exists()


def test_an_empty_parity_text(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    path = str(tmp_path / "empty.txt")
    assert_refused(export(capsys, run, "--parity-text", path), f"--parity-text {path}: is empty")


def test_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(capsys), "no --run was given", "python -m distill")
    assert_refused(call(capsys, "--run", "nothing"), "--run nothing", "python -m distill")


def without(name: str) -> Callable[[Path], object]:
    return lambda student: (student / name).unlink()


def flipped(student: Path) -> None:
    path = student / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncated(student: Path) -> None:
    path = student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_and_sealed(student: Path) -> None:
    truncated(student)
    reseal(student)


def contradicted(student: Path) -> None:
    """A plan that keeps what the tensors have factored."""
    plan = read_json(student / "plan.json")
    for decision in plan["decisions"]:
        if decision["action"] == "approximate":
            decision["action"] = "keep"
            decision["rank"] = min(decision["out_features"], decision["in_features"])
            decision["macs"] = decision["out_features"] * decision["in_features"]
            break
    (student / "plan.json").write_text(json.dumps(plan))
    reseal(student)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("model.safetensors"), ["model.safetensors", "python -m distill"]),
        (without("tokenizer.json"), ["tokenizer.json"]),
        (without("plan.json"), ["plan.json"]),
        (without("manifest.json"), ["no finished artefact"]),
        (flipped, ["model.safetensors", "sha256"]),
        (truncated, ["model.safetensors"]),
        (truncated_and_sealed, ["model.safetensors", "truncated"]),
        (contradicted, ["plan.json", "keep", "tensors"]),
    ],
    ids=[
        "no tensors", "no tokenizer", "no plan", "no manifest", "altered", "truncated",
        "truncated and sealed", "another plan",
    ],
)  # fmt: skip
def test_a_damaged_student(
    damage: Callable[[Path], object], words: list[str], run: Path, capsys: Capture
) -> None:
    damage(run / "student")
    assert_refused(export(capsys, run, "--precision", "fp32"), *words)
    assert not list(run.glob("engine-*")) and leftovers(run) == []
    assert finished_directories(run) <= {"student"} if damage is truncated_and_sealed else True


@pytest.mark.parametrize("place", ["onnx/ort-fp32/model.onnx", "engine-ort/fp32-cpu/model.onnx"])
def test_a_corrupt_graph_or_engine_is_not_used(
    place: str, exported: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    (run / place).write_bytes((run / place).read_bytes()[:100])
    ended = export(capsys, run, "--precision", "fp32")
    assert_refused(ended, place, "python -m export")
    assert export(capsys, run, "--precision", "fp32", "--overwrite").status == 0


def test_a_graph_that_fails_the_gate_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """One weight of the finished graph is scaled before the gate sees it."""
    import export.pipeline as pipeline

    save = pipeline.save_onnx

    def save_scaled(model: object, directory: Path) -> None:
        save(model, directory)  # type: ignore[arg-type]
        data = np.memmap(directory / "model.onnx.data", np.float32, mode="r+")
        data[-2000:] *= 1.5
        data.flush()

    monkeypatch.setattr(pipeline, "save_onnx", save_scaled)
    ended = export(capsys, run, "--precision", "fp32")
    assert_refused(ended, "the ort fp32 graph differs", "diverges", "nothing was kept")
    assert finished_directories(run) == {"student"} and leftovers(run) == []


@pytest.mark.parametrize(
    ("flags", "limit_bytes"),
    [
        (["--precision", "fp32"], 100_000),
        (["--precision", "int8"], 600_000),
        (["--engine", "trt", "--precision", "fp16"], 600_000),
    ],
    ids=["graph", "quantised", "engine"],
)
def test_a_full_disk(
    flags: list[str], limit_bytes: int, run: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    if "trt" in flags and NO_RTX:
        pytest.skip("needs the extra rtx")
    with file_size_limit(limit_bytes):
        ended = export(capsys, run, *flags)
    if ended.status == 0:  # everything this command writes is smaller than the limit
        sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
        assert max(sizes) < limit_bytes
    else:
        assert_refused(ended, "free disk")
    finished_directories(run)
    assert leftovers(run) == []
    assert export(capsys, run, *flags).status == 0


def test_too_little_disk_is_refused_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(export(capsys, run, "--precision", "fp32"), "GiB of disk", "free some space")
    assert finished_directories(run) == {"student"}


def test_an_optimisation_that_changes_the_numbers_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    shutil.rmtree(run / "engine-ort")
    monkeypatch.setattr("export.engine_ort.LARGEST_DIFFERENCE", {"fp32": -1.0})
    ended = export(capsys, run, "--precision", "fp32")
    assert_refused(ended, f"ONNX Runtime {onnxruntime.__version__}", "differs from the exported")
    assert leftovers(run) == [] and not list(run.glob("engine-ort/*"))
