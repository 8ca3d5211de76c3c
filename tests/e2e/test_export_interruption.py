"""Exports killed or interrupted in every step: nothing is half-written, and they go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.e2e.export_runs import call, finished_directories, start, write_student
from tests.e2e.faults import INTERRUPTED, KILLED, Fault, finished, leftovers

ORT = ["--precision", "fp32", "int8"]
GRAPHS = {"onnx/ort-fp32", "onnx/ort-int8"}
ENGINES = {"engine-ort/fp32-cpu", "engine-ort/int8-cpu"}


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return write_student(tmp_path_factory.mktemp("pristine") / "run", tiny_tokenizer)


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.mark.parametrize(
    ("fault", "done"),
    [
        (Fault("export.pipeline:lower"), set()),
        (Fault("export.pipeline:save_onnx", when="after"), set()),
        (Fault("export.pipeline:check_parity"), set()),
        (Fault("export.pipeline:write_manifest", when="after"), set()),
        (Fault("export.engine_ort:open_session", when="after"), {"onnx/ort-fp32"}),
        (
            Fault("export.engine_ort:write_manifest", when="after"),
            {"onnx/ort-fp32"},
        ),
        (
            Fault("export.pipeline:quantize", when="after"),
            {"onnx/ort-fp32", "engine-ort/fp32-cpu"},
        ),
    ],
    ids=str,
)
def test_a_killed_export_goes_on(
    fault: Fault, done: set[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--run", str(run), *ORT]
    assert finished(start(argv, tmp_path / "err", fault)) == KILLED
    assert finished_directories(run) == {"student", *done}
    ended = call(capsys, *argv)
    assert ended.status == 0, ended.err
    assert finished_directories(run) == {"student"} | GRAPHS | ENGINES
    assert leftovers(run) == []


def test_an_interrupted_export_says_how_to_go_on(run: Path, tmp_path: Path) -> None:
    fault = Fault("export.pipeline:check_parity", strike="interrupt")
    argv = ["--run", str(run), *ORT]
    assert finished(start(argv, tmp_path / "err", fault)) == INTERRUPTED
    assert (tmp_path / "err").read_text().endswith("go on with the same command\n")
    assert finished_directories(run) == {"student"} and leftovers(run) == []


def test_a_killed_replacement_leaves_the_old_engine(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the old directory was aside already and the new one not yet in place."""
    argv = ["--run", str(run), "--precision", "fp32"]
    assert call(capsys, *argv).status == 0
    before = finished_directories(run)
    fault = Fault("distill.commit:_replace_directory")
    assert finished(start([*argv, "--overwrite"], tmp_path / "err", fault)) == KILLED
    assert finished_directories(run) == before
    graph = run / "onnx" / "ort-fp32"
    graph.rename(graph.with_name(".ort-fp32.replaced-999999999"))
    assert call(capsys, *argv).status == 0
    assert finished_directories(run) == before and leftovers(run) == []
