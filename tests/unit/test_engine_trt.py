"""TensorRT export without TensorRT: targets, profiles, the graph's inputs, refusals, build kits.

Builds for a GPU that is here run against a stand-in for `tensorrt` (tests/unit/fake_tensorrt.py):
they check which calls are made, not what TensorRT does. Real builds: tests/e2e/test_engine_trt_rtx.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest

from distill import resources
from distill.artifact import UserError, open_artifact
from export import engine_trt, trt_api, trt_device, trt_place
from export.engine_trt import build_engine, host_bytes_needed
from export.trt_api import BuildError
from export.trt_builder import first_release
from export.trt_check import check_engine, read_record
from export.trt_kit import CARRIED, trtexec_command
from export.trt_onnx import Limits, prepare_onnx, profiles_of
from export.trt_place import Place, choose_place, graph_here, graph_of_kit
from export.trt_progress import PhaseTree
from export.trt_targets import AHEAD_OF_TIME, split_targets
from tests.trt_models import LAYERS, seal, write_decoder
from tests.unit.fake_tensorrt import ENGINE_BYTES, NETWORK_FLAG, FakeTensorRt

LIMITS = {"max_batch": 2, "max_seq": 32, "max_past": 64, "workspace_bytes": 2**28}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_decoder(tmp_path / "run" / "onnx" / "standard-fp16")


@pytest.fixture
def engine_directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "engine-trt" / "fp16"


def machine(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, modules: dict[str, Any] | None = None
) -> None:
    """Pretend: this GPU answers, and these TensorRT modules (and no others) import."""
    modules = modules or {}
    monkeypatch.setattr(trt_place, "gpu_sm", lambda: gpu)
    monkeypatch.setattr(trt_device, "gpu_sm", lambda: gpu)

    def find(name: str) -> Any:
        if name in modules:
            return modules[name]
        if name.startswith("tensorrt"):
            raise ImportError(f"No module named '{name}'")
        return importlib.import_module(name)

    monkeypatch.setattr(trt_api.importlib, "import_module", find)


def build(source: Path, directory: Path, **changes: Any) -> engine_trt.EngineReport:
    options: dict[str, Any] = {**LIMITS, "targets": None, "argv": ["test"], **changes}
    return build_engine(source, directory, **options)


# Targets and places


def test_targets_are_sorted_into_those_built_here_and_on_the_device() -> None:
    split = split_targets(["SM89", "sm87", "sm_86", "sm86", "sm90"])
    assert (split.ahead_of_time, split.on_device) == (("sm86", "sm89"), ("sm87", "sm90"))


def test_every_unknown_target_is_named() -> None:
    with pytest.raises(BuildError, match="sm42,tegra: .*sm75,sm80.*sm87"):
        split_targets(["sm86", "tegra", "sm42"])


@pytest.mark.parametrize(
    ("gpu", "modules", "targets", "expected"),
    [
        (None, ["tensorrt_rtx"], None, Place("tensorrt_rtx", tuple(AHEAD_OF_TIME), ())),
        ("sm87", ["tensorrt"], None, Place("tensorrt", ("sm87",), ())),
        ("sm87", ["tensorrt"], ["sm87"], Place("tensorrt", ("sm87",), ())),
        ("sm89", ["tensorrt"], ["sm86"], Place("tensorrt_rtx", ("sm86",), ())),
        (None, [], ["sm90", "sm87"], Place("tensorrt_rtx", (), ("sm87", "sm90"))),
        (None, [], ["sm87", "sm86"], Place("tensorrt_rtx", ("sm86",), ("sm87",))),
    ],
)
def test_where_an_engine_is_built(
    monkeypatch: pytest.MonkeyPatch,
    gpu: str | None,
    modules: list[str],
    targets: list[str] | None,
    expected: Place,
) -> None:
    machine(monkeypatch, gpu, {name: FakeTensorRt("10.9.0") for name in modules})
    assert choose_place(targets, "fp16", "fp16") == expected


@pytest.mark.parametrize(
    ("targets", "precision", "expected"),
    [
        (["sm87"], "fp16", "plain"),
        (["sm110"], "bf16", "plain"),
        (["sm90", "sm100"], "fp16", "standard"),
        (["sm87", "sm90"], "fp16", "plain"),
        (["sm90"], "int4", "plain"),
    ],
)
def test_a_kit_gets_the_graph_that_its_devices_parse(
    targets: list[str], precision: str, expected: str
) -> None:
    assert graph_of_kit(targets, precision) == expected


@pytest.mark.parametrize(
    ("release", "precision", "expected"),
    [("10.3.0", "fp16", "plain"), ("10.15.1", "fp16", "standard"), ("11.0.0", "int8", "plain")],
)
def test_an_installed_tensorrt_gets_the_graph_that_it_parses(
    monkeypatch: pytest.MonkeyPatch, release: str, precision: str, expected: str
) -> None:
    machine(monkeypatch, "sm87", {"tensorrt": FakeTensorRt(release)})
    assert graph_here(Place("tensorrt", ("sm87",), ()), precision) == expected
    assert graph_here(Place("tensorrt_rtx", ("sm86",), ("sm87",)), precision) == "standard"


@pytest.mark.parametrize(
    ("precision", "activations", "reason"),
    [
        ("bf16", "bf16", "has no bfloat16"),
        ("fp32", "fp32", "gets no fp32 with fp32 activations from TensorRT-RTX"),
        ("int8", "fp32", "gets no int8 with fp32 activations from TensorRT-RTX"),
        ("int4", "fp16", "gets no int4 with fp16 activations from TensorRT-RTX"),
    ],
)
def test_what_turing_lacks_is_left_out_and_refused_by_name(
    monkeypatch: Any, precision: str, activations: str, reason: str
) -> None:
    machine(monkeypatch, None)
    newer = ("sm80", "sm86", "sm89", "sm120", "sm121")
    assert choose_place(None, precision, activations).here == newer
    with pytest.raises(BuildError, match=f"sm75: .* {reason}; use --precision fp16"):
        choose_place(["sm75", "sm80"], precision, activations)
    assert choose_place(["sm75"], "fp16", "fp16").here == ("sm75",)
    assert choose_place(["sm75"], "int8", "fp16").here == ("sm75",)


def test_a_gpu_without_tensorrt_is_not_passed_over_in_silence(monkeypatch: Any) -> None:
    machine(monkeypatch, "sm89", {"tensorrt_rtx": FakeTensorRt("1.7.1")})
    with pytest.raises(BuildError, match=r"GPU here is sm89.*\.\[gpu\].*--target sm75"):
        choose_place(None, "fp16", "fp16")


def test_tensorrt_builds_for_the_gpu_here_only(monkeypatch: Any) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0")})
    with pytest.raises(BuildError, match="GPU here only"):
        choose_place(["sm86"], "fp16", "fp16", "tensorrt")
    machine(monkeypatch, None, {"tensorrt": FakeTensorRt("10.9.0")})
    with pytest.raises(BuildError, match="needs an NVIDIA GPU"):
        choose_place(None, "fp16", "fp16", "tensorrt")


def test_absent_tensorrt_names_the_command_that_installs_it(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, None)
    with pytest.raises(UserError, match=r"tensorrt_rtx; .*pip install .*\[rtx\]"):
        build(source, engine_directory)
    assert not engine_directory.exists()


# The graph and its profiles


def test_profiles_follow_the_names_of_the_dimensions(source: Path) -> None:
    profiles = profiles_of(prepare_onnx(source, "input").inputs, Limits(4, 100, 1000))
    prefill, decode = profiles["prefill"], profiles["decode"]
    assert prefill["input_ids"] == {"min": [1, 1], "opt": [1, 50], "max": [4, 100]}
    assert prefill["attention_mask"]["max"] == [4, 1100]
    assert prefill["past_key_values.1.key"]["min"] == [1, 2, 0, 16]
    assert decode["past_key_values.0.value"] == {
        "min": [1, 2, 0, 16], "opt": [4, 2, 500, 16], "max": [4, 2, 1000, 16],
    }  # fmt: skip
    assert decode["attention_mask"] == {"min": [1, 1], "opt": [4, 501], "max": [4, 1001]}
    assert prefill["logits_to_keep"]["max"] == [100] and decode["logits_to_keep"]["max"] == [1]


def test_a_dimension_of_another_name_is_refused() -> None:
    with pytest.raises(UserError, match="input_ids has the dimension rows"):
        profiles_of({"input_ids": ("rows", "sequence")}, Limits(1, 1, 1))


@pytest.mark.parametrize(("logits", "is_input"), [("input", True), ("last", False), ("all", False)])
def test_logits_to_keep_is_an_input_or_a_constant(
    source: Path, logits: Any, is_input: bool
) -> None:
    prepared = prepare_onnx(source, logits)
    graph = onnx.load_model_from_string(prepared.onnx_bytes).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    assert ("logits_to_keep" in prepared.inputs) == is_input
    assert ("logits_to_keep" in constants) != is_input
    if not is_input:
        value = onnx.numpy_helper.to_array(constants["logits_to_keep"]).item()
        assert value == (1 if logits == "last" else 2**31 - 1)


def test_weights_outside_the_directory_are_refused(source: Path) -> None:
    model = onnx.load_model(source / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"'\.\./model\.onnx\.data'"):
        prepare_onnx(source, "input")


@pytest.mark.parametrize("damage", [b"", b"not an ONNX", None])
def test_a_damaged_graph_is_refused(source: Path, damage: bytes | None) -> None:
    whole = (source / "model.onnx").read_bytes()
    (source / "model.onnx").write_bytes(whole[:777] if damage is None else damage)
    with pytest.raises(UserError, match=r"model\.onnx"):
        prepare_onnx(source, "input")


def test_the_flavour_of_onnx_runtime_is_refused(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "onnx", manifest_flavour="ort")
    with pytest.raises(UserError, match="'ort' flavour; .*--engine trt"):
        build(source, tmp_path / "engine")


def test_progress_never_falls_and_ends_at_one() -> None:
    shares: list[float] = []
    tree = PhaseTree(lambda share, phase: shares.append(share))
    tree.start("all", None, 2)
    tree.start("part", "all", 4)
    for step in range(4):
        tree.step("part", step)
    tree.finish("part")
    tree.step("all", 0)
    tree.step("all", 1)
    tree.finish("all")
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert 0.125 in shares, "a quarter of the first half"


# Builds for the GPU here, by a stand-in for tensorrt


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 1 << NETWORK_FLAG), ("11.2.0", 0)])
def test_both_releases_are_driven_by_the_same_code(
    monkeypatch: Any, source: Path, engine_directory: Path, version: str, flags: int
) -> None:
    fake = FakeTensorRt(version)
    machine(monkeypatch, "sm87", {"tensorrt": fake})
    report = build(source, engine_directory)
    assert report.place == Place("tensorrt", ("sm87",), ())
    assert fake.network.flags == flags, "strongly typed"
    assert fake.config.pools == {"WORKSPACE": LIMITS["workspace_bytes"]}
    assert fake.config.cleared == ["TF32"], "fp32 means fp32"
    assert [sorted(profile.values) for profile in fake.config.profiles] == [["logits_to_keep"]] * 2
    assert len(fake.config.profiles[0].shapes) == 3 + 2 * LAYERS
    record = check_engine(engine_directory, "sm87", version, onnx_directory=source)
    assert record["flavour"] == "tensorrt" and record["targets"] == ["sm87"]
    assert open_artifact(engine_directory, "engine-trt")["measured"]["version"] == version
    assert (engine_directory / "model.engine").read_bytes() == ENGINE_BYTES


def test_timings_are_kept_for_the_next_build(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0")})
    build(source, engine_directory)
    build(source, engine_directory)
    assert (engine_directory.parent / "timing.cache").read_bytes() == b"+timed+timed"


def test_a_failed_build_leaves_the_engine_that_was_there(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0")})
    build(source, engine_directory)
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0", fails=True)})
    with pytest.raises(UserError, match="no tactic fits") as caught:
        build(source, engine_directory)
    assert "\n" not in str(caught.value)
    check_engine(engine_directory, "sm89", "10.9.0")


def test_a_builder_that_does_not_start_is_explained(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0", gpu=False)})
    with pytest.raises(UserError, match="cannot start a builder .* needs an NVIDIA GPU"):
        build(source, engine_directory)


def test_an_interrupt_cancels_the_build(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0", hangs=True)})
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        build(source, engine_directory)
    assert list(engine_directory.parent.iterdir()) == []


def test_too_little_memory_or_disk_is_refused_before_the_build(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0")})
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(UserError, match="TensorRT build needs .* GiB of memory"):
        build(source, engine_directory)
    full = shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="GiB of disk"):
        build(source, engine_directory)
    assert not engine_directory.exists()


def test_memory_grows_with_the_weights() -> None:
    assert host_bytes_needed(2**30) - host_bytes_needed(0) > 2**30


# Loading an engine elsewhere


@pytest.fixture
def engine(monkeypatch: Any, source: Path, engine_directory: Path) -> Path:
    machine(monkeypatch, "sm89", {"tensorrt": FakeTensorRt("10.9.0")})
    build(source, engine_directory)
    return engine_directory


@pytest.mark.parametrize(
    ("gpu", "version", "flavour", "line"),
    [
        ("sm86", "10.9.0", None, r"for sm89, the GPU here is sm86 .*--target sm86 --overwrite"),
        ("sm89", "10.9.1", None, r"10\.9\.0, here is 10\.9\.1; .*--target sm89 --overwrite"),
        ("sm89", "10.9.0", "tensorrt_rtx", "built by TensorRT; needs that to load it"),
        ("sm87", "10.9.0", None, r"--target sm87 --overwrite \(on the device then: build\.py\)"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    engine: Path, gpu: str, version: str, flavour: Any, line: str
) -> None:
    check_engine(engine, "sm89", "10.9.0", flavour="tensorrt")
    with pytest.raises(UserError, match=line) as caught:
        check_engine(engine, gpu, version, flavour=flavour)
    assert "\n" not in str(caught.value)
    assert f"--run {engine.parents[1]} " in str(caught.value) or flavour


def test_an_altered_engine_is_refused(engine: Path) -> None:
    (engine / "model.engine").write_bytes(ENGINE_BYTES[::-1])
    with pytest.raises(UserError, match="model.engine is not the file that was written"):
        check_engine(engine, "sm89", "10.9.0")
    (engine / "model.engine").unlink()
    with pytest.raises(UserError, match="model.engine is missing"):
        check_engine(engine, "sm89", "10.9.0")


def test_an_engine_of_another_onnx_is_refused(engine: Path, source: Path) -> None:
    check_engine(engine, "sm89", "10.9.0", onnx_directory=source)
    (source / "tokenizer.json").write_text('{"new": true}')
    seal(source)
    with pytest.raises(UserError, match="from another ONNX"):
        check_engine(engine, "sm89", "10.9.0", onnx_directory=source)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 99}'])
def test_a_damaged_record_is_refused(engine: Path, text: str) -> None:
    (engine / "build.json").write_text(text)
    with pytest.raises(UserError, match=r"build\.json"):
        read_record(engine)


# Build kits


@pytest.fixture
def kit(monkeypatch: Any, source: Path, engine_directory: Path) -> Path:
    machine(monkeypatch, None)
    report = build(source, engine_directory, targets=["sm87"])
    assert report.record is None and report.place.kit == ("sm87",)
    return engine_directory


def test_a_kit_is_an_artefact_that_names_its_build_command(kit: Path) -> None:
    assert open_artifact(kit, "engine-trt")["measured"]["kit_targets"] == ["sm87"]
    with pytest.raises(UserError, match=r"no engine yet; .*python3 .*build\.py"):
        check_engine(kit, "sm87", "10.3.0")
    readme = (kit / "README.md").read_text()
    assert "Jetson Orin (sm87)" in readme and "python3 build.py" in readme
    assert "trtexec --stronglyTyped" in readme and "logits_to_keep:1" in readme


def test_the_device_builds_its_kit(monkeypatch: Any, kit: Path) -> None:
    fake = FakeTensorRt("10.3.0")
    machine(monkeypatch, "sm87", {"tensorrt": fake})
    assert trt_device.main(["--kit", str(kit), "--workspace-mib", "64"]) == 0
    record = check_engine(kit, "sm87", "10.3.0")
    assert record["precision"] == "fp16" and record["targets"] == ["sm87"]
    assert fake.network.flags == 1 << NETWORK_FLAG
    assert fake.config.pools == {"WORKSPACE": 64 * 2**20}
    assert (kit / "timing.cache").read_bytes() == b"+timed"


def test_a_kit_is_not_made_of_what_its_device_cannot_parse(
    monkeypatch: Any, source: Path, engine_directory: Path
) -> None:
    machine(monkeypatch, None)
    graph = onnx.load_model(source / "model.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "RMSNormalization"
    (source / "model.onnx").write_bytes(graph.SerializeToString())
    seal(source)
    with pytest.raises(UserError, match=r"RMSNormalization.* from 10\.15 on; the kit for sm87"):
        build(source, engine_directory, targets=["sm87"])
    assert not engine_directory.exists()
    build(source, engine_directory, targets=["sm90"])
    machine(monkeypatch, "sm90", {"tensorrt": FakeTensorRt("10.9.0")})
    assert trt_device.main(["--kit", str(engine_directory)]) == 2


def test_an_older_tensorrt_on_the_device_is_told_which_it_takes(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str], kit: Path
) -> None:
    kit_json = json.loads((kit / "kit.json").read_text())
    (kit / "kit.json").write_text(json.dumps({**kit_json, "first_release": [10, 15]}))
    machine(monkeypatch, "sm87", {"tensorrt": FakeTensorRt("10.3.0")})
    assert trt_device.main(["--kit", str(kit)]) == 2
    assert "TensorRT 10.3.0 is here; this kit is for 10.15 or newer" in capsys.readouterr().err


def damaged_weights(kit: Path) -> None:
    path = kit / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def damaged_description(kit: Path) -> None:
    (kit / "kit.json").write_text("{")


@pytest.mark.parametrize(
    ("gpu", "fake", "damage", "line"),
    [
        (None, FakeTensorRt("10.3.0"), None, "no NVIDIA GPU answers here"),
        ("sm86", FakeTensorRt("10.3.0"), None, r"GPU here is sm86 .* this kit is for sm87"),
        ("sm87", None, None, "TensorRT cannot be imported .*JetPack"),
        ("sm87", FakeTensorRt("10.3.0", fails=True), None, "could not build model.onnx"),
        ("sm87", FakeTensorRt("10.3.0"), damaged_weights, r"model\.onnx\.data is not the file"),
        ("sm87", FakeTensorRt("10.3.0"), damaged_description, r"kit\.json cannot be read"),
    ],
)
def test_the_device_explains_what_is_wrong(
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
    kit: Path,
    gpu: str | None,
    fake: Any,
    damage: Any,
    line: str,
) -> None:
    machine(monkeypatch, gpu, {} if fake is None else {"tensorrt": fake})
    if damage is not None:
        damage(kit)
    assert trt_device.main(["--kit", str(kit)]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(line, errors[0])
    assert not (kit / "model.engine").exists() and not (kit / "build.json").exists()


def test_another_gpu_may_be_asked_for(monkeypatch: Any, kit: Path) -> None:
    machine(monkeypatch, "sm90", {"tensorrt": FakeTensorRt("10.3.0")})
    assert trt_device.main(["--kit", str(kit), "--any-gpu"]) == 0
    assert json.loads((kit / "build.json").read_text())["targets"] == ["sm90"]


def test_what_a_kit_carries_needs_only_the_standard_library() -> None:
    folder = Path(engine_trt.__file__).parent
    standard, ours = sys.stdlib_module_names, {f"export.{name}" for name in CARRIED}
    for name in (*CARRIED, "trt_device"):
        imported = set()
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
        foreign = {module for module in imported - ours if module.split(".")[0] not in standard}
        assert not foreign, f"{name} imports {foreign}"


def test_operators_that_an_older_parser_lacks_are_known() -> None:
    assert first_release(frozenset({"MatMul"})) == (10, 0)
    assert first_release(frozenset({"MatMul", "Attention", "RMSNormalization"})) == (10, 15)


def test_trtexec_gets_both_profiles() -> None:
    sizes = {"min": [1, 1], "opt": [1, 8], "max": [2, 16]}
    command = trtexec_command({"prefill": {"x": sizes}, "decode": {"x": sizes}}, 2**30)
    assert "--profile=0" in command and "--profile=1" in command
    assert "--memPoolSize=workspace:1024M" in command and "--maxShapes=x:2x16" in command
