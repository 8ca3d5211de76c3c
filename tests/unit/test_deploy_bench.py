"""Ceilings, devices, power readings, timing, and what ``bench`` prints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from transformers import PreTrainedTokenizerFast

from deploy import ceilings as ceilings_module
from deploy.__main__ import main
from deploy.bench_timing import Workload, interleaved_samples, run_test
from deploy.ceilings import MeasuredCeilings, Work, measure_ceilings, read_rate, work_of
from deploy.devices import DEVICES, device_named, predictions
from deploy.power import read_power, warnings_of
from deploy.runner import open_runner
from deploy.tiny_onnx import matmul_model
from distill.artifact import UserError
from distill.plan import Plan
from export.trt_targets import KNOWN
from tests.deploy_engines import Engines


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of a toy size: their figures are not looked at."""
    monkeypatch.setattr(ceilings_module, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings_module, "MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings_module, "REPEATS", 1)


def test_a_model_written_without_onnx_is_valid_and_right() -> None:
    weights = np.arange(300 * 2, dtype=np.float32).reshape(300, 2)
    content = matmul_model("MatMul", "float32", (4, 300), ("float32", (4, 2)), {"w": weights})
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), weights)
    blocks = {"b": np.zeros((1, 1, 16), np.uint8)}
    whole = matmul_model(
        "MatMulNBits", "float32", (1, 32), ("float32", (1, 1)), blocks,
        domain="com.microsoft", attributes={"K": 32, "bits": 4},
    )  # fmt: skip
    node = onnx.load_from_string(whole).graph.node[0]
    assert [(a.name, a.i, a.type) for a in node.attribute] == [("K", 32, 2), ("bits", 4, 2)]
    assert (node.domain, list(node.input)) == ("com.microsoft", ["x", "b"])


def test_ceilings_of_this_machine_are_plausible() -> None:
    """Within what any CPU core does: a wrong unit would be a thousand times off."""
    found = measure_ceilings(1)
    assert 5e8 < found.memory_bytes_per_s < 1e12
    assert 1e9 < found.matmul_operations_per_s["fp32"] < 1e12
    assert found.matmul_flops_per_s("int4") >= found.matmul_flops_per_s("fp32")
    assert json.loads(json.dumps(found.to_json()))["threads"] == 1
    assert read_rate(1, 2**24) > 5e8


def test_the_best_of_two_ceilings_is_taken_rate_by_rate() -> None:
    first = MeasuredCeilings(2, 5.0, {"fp32": 10.0, "int8": 40.0})
    second = MeasuredCeilings(2, 7.0, {"fp32": 8.0, "int8": 44.0})
    assert first.best_of(second) == MeasuredCeilings(2, 7.0, {"fp32": 10.0, "int8": 44.0})


def test_the_work_of_an_engine_is_that_of_its_plan(engines: Engines) -> None:
    directory = engines.engine("int8")
    work = work_of(directory, "int8")
    plan = Plan.load(directory / "plan.json")
    assert work is not None
    assert work.target_macs == sum(d.macs for d in plan.decisions)
    assert work.head_macs == 384 * 64
    assert work.weight_bytes == 1.125 * (work.target_macs + work.head_macs)
    assert work_of(directory.parent, "int8") is None


def test_floors_by_hand() -> None:
    work = Work(target_macs=1000, head_macs=500, weight_bytes=6000)
    ceilings = MeasuredCeilings(1, 1e6, {"fp32": 1e6, "int8": 4e6})
    assert work.floor_s(ceilings, "fp32", tokens=1, rows=1) == (6000 / 1e6, "memory")
    seconds, bound = work.floor_s(ceilings, "fp32", tokens=100, rows=2)
    assert (seconds, bound) == (pytest.approx(2 * (100 * 1000 + 2 * 500) / 1e6), "matmul")
    assert work.floor_s(ceilings, "int4", tokens=100, rows=2)[0] == pytest.approx(seconds / 4)


def test_every_device_is_known_to_the_export(engines: Engines) -> None:
    assert {device.sm for device in DEVICES.values()} <= KNOWN.keys()
    families = ("orin-nano", "orin-nx", "agx-orin", "thor", "dgx-spark", "l4", "a10", "h100")
    assert set(families) <= DEVICES.keys()
    for generation in ("rtx-30", "rtx-40", "rtx-50"):
        assert any(key.startswith(generation) for key in DEVICES)
    with pytest.raises(UserError, match="device 'orin' is not known; allowed are orin-nano,"):
        device_named("orin")


def test_predictions_are_bandwidth_over_bytes(engines: Engines) -> None:
    directory = engines.engine("int8")
    found = predictions(directory, [device_named("orin-nano")], ["int4"])[0].to_json()
    work = work_of(directory, "int4")
    assert work is not None
    assert found["decode_ceiling_tokens_per_s"] == pytest.approx(68e9 / work.weight_bytes, rel=1e-3)
    assert found["fits"] and found["basis"].startswith("prediction")
    with pytest.raises(UserError, match="has no plan.json"):
        predictions(directory.parent)


def put_command(folder: Path, name: str, output: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)


MOVING = """\
SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano
cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=1510400
cpu5: Online=0 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=729600
GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=1
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=0"""


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    put_command(tmp_path, "nvpmodel", "NV Power Mode: 15W\n0")
    put_command(tmp_path, "jetson_clocks", MOVING)
    return tmp_path


def test_moving_clocks_of_a_jetson_are_a_warning(jetson: Path) -> None:
    state = read_power()
    assert state["nvpmodel"] == "NV Power Mode: 15W 0"
    warning = warnings_of(state, state)
    assert warning == ["clocks are not fixed (cpu0, GPU); fix them with: sudo jetson_clocks"]


def test_fixed_clocks_are_none(jetson: Path) -> None:
    fixed = MOVING.replace("729600", "1510400").replace("306000000", "624750000")
    put_command(jetson, "jetson_clocks", fixed)
    state = read_power()
    assert warnings_of(state, state) == []
    changed = {**state, "nvpmodel": "NV Power Mode: MAXN 2"}
    assert "changed from NV Power Mode: 15W" in warnings_of(state, changed)[0]
    (jetson / "jetson_clocks").write_text("#!/bin/sh\nexit 1\n")
    assert "cannot be read" in warnings_of(read_power(), read_power())[0]


def test_contenders_are_timed_in_turn() -> None:
    calls: list[str] = []
    now = iter(range(1000))
    samples = interleaved_samples(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        3,
        clock=lambda: float(next(now)),
    )
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}


@pytest.mark.parametrize(
    ("test", "shapes"),
    [
        (Workload(6, 0, 2), [(2, 6)]),
        (Workload(0, 3), [(1, 1)] * 3),
        (Workload(4, 2), [(1, 4), (1, 1), (1, 1)]),
    ],
)
def test_what_a_test_runs(engines: Engines, test: Workload, shapes: list[tuple[int, int]]) -> None:
    runner: Any = open_runner(engines.engine(), threads=1)
    found, forward = [], runner.forward

    def counted(ids_BS: np.ndarray, *rest: Any, **names: Any) -> np.ndarray:
        found.append(ids_BS.shape)
        return forward(ids_BS, *rest, **names)

    runner.forward = counted
    run_test(runner, test)
    assert found == shapes
    assert test.tokens == test.batch * sum(shape[1] for shape in shapes)


def bench(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["bench", *argv]) == 0
    return capsys.readouterr().out


def test_bench_in_three_formats(
    engines: Engines, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for precision in ("int8", "int4"):
        engines.engine(precision)
    flags = (
        "--run",
        str(engines.run),
        "--engine",
        "int8",
        "--engine",
        "int4",
        "-p",
        "8",
        "-n",
        "2",
    )
    more = ("-pg", "4,2", "-b", "1,2", "-t", "1,2", "-r", "3")
    report = json.loads(bench(capsys, *flags, *more, "-o", "json"))
    assert len(report["rows"]) == 2 * 3 * 2 * 2
    assert {row["test"] for row in report["rows"]} == {"pp8", "tg2", "pp4+tg2"}
    for row in report["rows"]:
        assert len(row["samples_s"]) == 3
        median = row["batch"] * (row["prompt_tokens"] + row["decoded_tokens"])
        assert row["tokens_per_s"] == pytest.approx(median / np.median(row["samples_s"]), rel=1e-6)
        assert row["tokens_per_s_p5"] <= row["tokens_per_s"] <= row["tokens_per_s_p95"]
        share = row["tokens_per_s"] / row["ceiling_tokens_per_s"]
        assert row["ceiling_fraction"] == pytest.approx(share)
    assert [c["threads"] for c in report["ceilings"]] == [1, 2]
    lines = bench(capsys, *flags, "-t", "1", "-r", "1", "-o", "csv").splitlines()
    assert lines[0].startswith("contender,engine,version,precision") and len(lines) == 5
    table = bench(capsys, *flags, "-t", "1", "-r", "1")
    assert "| engine-ort/int8-cpu | int8 | 1 | 1 | pp8 |" in table
    assert "Ceiling: weights read once a pass" in table


def test_bench_predicts_devices(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    engines.engine("int8")
    table = bench(capsys, "--run", str(engines.run), "--devices")
    assert "| orin-nano | int4 |" in table and "never run on it" in table
    rows = json.loads(bench(capsys, "--run", str(engines.run), "--devices", "-o", "json"))
    assert len(rows) == 3 * len(DEVICES)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-pg", "5"], "two whole numbers"),
        (["-r", "0"], "--repetitions 0"),
        (["--peer", "other"], "invalid choice"),
        (["--gguf", "x.gguf"], "add --peer"),
    ],
)
def test_bench_refuses(
    engines: Engines, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engines.engine("int8")
    assert main(["bench", "--run", str(engines.run), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_peer_without_its_package(
    engines: Engines,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines.engine("int8")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["bench", "--run", str(engines.run), "--peer", "llama.cpp", "-t", "1"]) == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err
