"""The parity gate passes what is right and refuses what is wrong, naming figure and block."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.helper import make_node
from transformers import PreTrainedTokenizerFast

from distill.artifact import UserError
from export.files import copy_companions
from export.lower import lower, save_onnx
from export.parity import ParityError, check_parity
from export.parity_cases import prefill_case
from export.parity_figures import LIMITS, Tally, failure_of
from export.parity_gate import Gate, Refusal
from export.parity_reference import Reference
from tests.conftest import TRAINING_TEXT
from tests.parity.lower_cases import save_case, student_model

SIZES: dict[str, Any] = {"max_seq": 24, "max_past": 100, "threads": 1, "show_progress": False}


def export(student: Path, directory: Path, flavour: Any = "ort", precision: Any = "fp32") -> Path:
    directory.mkdir()
    save_onnx(lower(student, flavour=flavour, precision=precision), directory)
    copy_companions(student, directory)
    return directory


def gate(student: Path, directory: Path, precision: str = "fp32", **options: Any) -> Any:
    options = {"text": TRAINING_TEXT, **SIZES, **options}
    return check_parity(student, directory, precision=precision, **options)


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A llama of three blocks, every other module factored, some outputs removed."""
    directory = tmp_path_factory.mktemp("gate") / "student"
    return save_case(directory, student_model("llama", "factored"), tiny_tokenizer)


@pytest.fixture(scope="module")
def exported(student: Path) -> Callable[[str, str], Path]:
    made: dict[str, Path] = {}

    def directory_of(flavour: str = "ort", precision: str = "fp32") -> Path:
        key = f"{flavour}-{precision}"
        if key not in made:
            made[key] = export(student, student.parent / key, flavour, precision)
        return made[key]

    return directory_of


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize("mix", ["keep", "outputs removed"])
def test_a_right_graph_passes(
    family: str, flavour: str, mix: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = save_case(tmp_path / "student", student_model(family, mix), tiny_tokenizer)
    report = gate(student, export(student, tmp_path / "onnx", flavour))
    assert report.top1_agreement == 1 and report.max_logit_difference <= 2e-3
    assert report.greedy_matches == report.greedy_prefix == report.greedy_steps == 64
    names = {case.name for case in report.cases}
    assert {"decode", "past of one token", "left padding", "a fully masked row"} <= names
    assert ("padding inside the cache" in names) == (family not in ("mistral", "gemma3_text"))
    assert report.to_json()["cases"][0]["positions"] == 65


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize(("precision", "arithmetic"), [("fp16", "fp16"), ("bf16", "fp32")])
def test_half_precision_passes_its_own_limits_and_not_those_of_fp32(
    student: Path, exported: Any, flavour: str, precision: str, arithmetic: str
) -> None:
    directory = exported(flavour, precision)
    report = gate(student, directory, precision)
    assert report.arithmetic == arithmetic
    assert 0 < report.max_logit_difference
    with pytest.raises(ParityError, match="largest logit difference"):
        gate(student, directory, precision, limits=replace(LIMITS["fp32"], kl=1))


def test_the_kl_to_the_student_is_judged(student: Path, exported: Any) -> None:
    with pytest.raises(ParityError, match=r"mean KL \(nats\) so far"):
        gate(student, exported("ort", "fp16"), "fp16", limits=replace(LIMITS["fp16"], kl=0.0))


@pytest.mark.parametrize(("before", "passes"), [(0, False), (1000, True)])
def test_one_position_of_a_short_case_weighs_as_one_of_all(before: int, passes: bool) -> None:
    judge = Gate("fp16", cast(Any, None), cast(Any, None), LIMITS["fp16"])
    text, short = Tally(), Tally()
    text.positions, short.positions, short.kl = before, 10, 0.1
    case = prefill_case("short", np.arange(10))
    judge._judge(case, text, None)
    if passes:
        judge._judge(case, short, None)
    else:
        with pytest.raises(Refusal, match="mean KL"):
            judge._judge(case, short, None)


def test_a_reference_serves_several_graphs(student: Path, exported: Any) -> None:
    reference = Reference(student)
    reports = [gate(student, exported(f), reference=reference) for f in ("ort", "standard")]
    assert reports[0].cross_entropy == reports[1].cross_entropy


def test_the_reference_is_the_model(student: Path) -> None:
    """Its shortcut over remembered hidden states gives the logits of a plain call."""
    reference = Reference(student)
    row_T = np.arange(3, 40)
    with torch.no_grad():
        expected_TV = reference.model(torch.from_numpy(row_T)[None]).logits[0]
    for positions_N in (np.arange(37), np.array([5, 36])):
        got_NV = reference.logits(row_T, positions_N)
        torch.testing.assert_close(got_NV, expected_TV[positions_N], rtol=0, atol=1e-5)


class Coarse(Reference):
    """A student whose float32 errs."""

    def logits(self, row_T: np.ndarray, positions_N: np.ndarray) -> torch.Tensor:
        return super().logits(row_T, positions_N) + 0.005 * (self.arithmetic == "float32")


def test_float64_decides_where_float32_is_too_coarse(student: Path, exported: Any) -> None:
    assert gate(student, exported()).reference == "float32"
    report = gate(student, exported(), reference=Coarse(student))
    assert report.reference == "float64" and report.max_logit_difference <= 2e-3


def test_a_wrong_graph_is_wrong_in_float64_too(
    student: Path, exported: Any, tmp_path: Path
) -> None:
    directory = broken(exported(), tmp_path / "wrong", scale("model.norm.weight", 1.001))
    reference = Coarse(student)
    with pytest.raises(ParityError, match="largest logit difference"):
        gate(student, directory, reference=reference)
    assert reference.arithmetic == "float64"


def test_without_memory_for_float64_the_refusal_stands(
    student: Path, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.parity_reference.available_memory_bytes", lambda: 1000)
    with pytest.raises(ParityError, match="largest logit difference 0.005"):
        gate(student, exported(), reference=Coarse(student))


def broken(source: Path, directory: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an exported directory whose graph was changed."""
    shutil.copytree(source, directory)
    model = onnx.load(directory / "model.onnx")
    change(model)
    for path in directory.glob("model.onnx*"):
        path.unlink()
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="data")
    return directory


def scale(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, name))

    return change


def node_of(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def causal_without_offset(model: onnx.ModelProto) -> None:
    """Token i of a call sees columns 0 to i of the cache: right for a prefill, wrong after it."""
    node = node_of(model, "positions")
    node.input[0] = node_of(model, "columns").input[0]
    node.input[1] = "sequence/scalar"


def mask_ignored(model: onnx.ModelProto) -> None:
    """Padding is looked at."""
    node = node_of(model, "allowed")
    node.input[1] = node.input[0]


def insert(model: onnx.ModelProto, before: str, *new: onnx.NodeProto) -> None:
    """Put nodes before the one that gives the value `before`."""
    nodes = list(model.graph.node)
    place = next(at for at, node in enumerate(nodes) if before in node.output)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place:]])


def positions_ignored(model: onnx.ModelProto) -> None:
    """Every token is at position 0."""
    insert(model, "position", make_node("Sub", ["position_ids", "position_ids"], ["all zero"]))
    node_of(model, "position").input[0] = "all zero"


def no_key_gives_nan(model: onnx.ModelProto) -> None:
    """A query that may look at nothing divides by zero."""
    mask = node_of(model, "mask")
    mask.output[0] = "mask before"
    user = next(node for node in model.graph.node if "mask" in node.input)
    insert(
        model,
        user.output[0],
        make_node("Cast", ["allowed"], ["allowed float"], to=onnx.TensorProto.FLOAT),
        make_node("ReduceMax", ["allowed float", mask_axis(model)], ["any allowed"], keepdims=1),
        make_node("Div", ["any allowed", "any allowed"], ["one or nan"]),
        make_node("Mul", ["mask before", "one or nan"], ["mask"]),
    )


def mask_axis(model: onnx.ModelProto) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "last axis"))
    return "last axis"


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            scale("model.layers.1.mlp.down_proj.up.weight", 1.02),
            ["plain prefill", "largest logit difference", "model.layers.1 "],
        ),
        (scale("model.norm.weight", 1.02), ["plain prefill", "no block diverges"]),
        (causal_without_offset, ["in decode", "model.layers.0 "]),
        (positions_ignored, ["plain prefill", "model.layers.0 "]),
        (mask_ignored, ["in left padding", "model.layers.0 "]),
    ],
    ids=["scaled weight", "scaled norm", "causal without offset", "positions", "mask"],
)
def test_a_wrong_graph_is_refused(
    student: Path,
    exported: Any,
    tmp_path: Path,
    flavour: str,
    change: Callable[[onnx.ModelProto], None],
    expected: list[str],
) -> None:
    directory = broken(exported(flavour), tmp_path / "broken", change)
    with pytest.raises(ParityError) as error:
        gate(student, directory)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("change", [causal_without_offset, mask_ignored])
def test_a_wrong_route_is_refused_whatever_the_precision_allows(
    student: Path,
    exported: Any,
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    precision: str,
) -> None:
    """Even where logits may differ, a graph must agree with itself along every route."""
    directory = broken(exported("ort"), tmp_path / "broken", change)
    with pytest.raises(ParityError):
        gate(student, directory, precision)
    gate(student, exported("ort"), precision)


def test_numbers_that_are_not_finite_are_refused(
    student: Path, exported: Any, tmp_path: Path
) -> None:
    directory = broken(exported("standard"), tmp_path / "broken", no_key_gives_nan)
    with pytest.raises(ParityError, match="left padding: .*NaN or infinities"):
        gate(student, directory)


def test_a_graph_that_does_not_run_is_refused(student: Path, exported: Any, tmp_path: Path) -> None:
    def reshaped(model: onnx.ModelProto) -> None:
        zero = make_node("Sub", ["attention_mask", "attention_mask"], ["zero"])
        longer = make_node("Add", ["position_ids", "zero"], ["as long as the cache"])
        insert(model, "position", zero, longer)
        node_of(model, "position").input[0] = "as long as the cache"

    directory = broken(exported("ort"), tmp_path / "broken", reshaped)
    with pytest.raises(ParityError, match="in decode: .*does not run"):
        gate(student, directory)


def test_ties_are_not_held_against_a_graph() -> None:
    expected_NV = torch.tensor([[1.0, 1.001, 0.0], [3.0, 1.0, 0.0]])
    tally = Tally()
    tally.add(expected_NV, torch.tensor([[1.001, 1.0, 0.0], [3.0, 1.0, 0.0]]), torch.tensor([0, 0]))
    assert tally.agreement == 1 and tally.ties == 1
    tally.add(expected_NV, torch.tensor([[1.0, 1.001, 0.0], [1.0, 3.0, 0.0]]))
    assert tally.agreement == 0.75 and tally.ties == 1


def test_logits_that_half_precision_cannot_tell_apart_are_ties() -> None:
    """Only where the graph's own logits are equal: a close second is another choice."""
    expected_NV = torch.tensor([[24.470, 24.475, 0.0]])
    tally = Tally()
    tally.add(expected_NV, expected_NV.half().float())
    assert tally.agreement == 1 and tally.ties == 1
    tally.add(expected_NV, torch.tensor([[24.484375, 24.46875, 0.0]]))
    assert tally.agreement == 0.5 and tally.ties == 1


def test_every_limit_can_fail() -> None:
    torch.manual_seed(0)
    expected_NV, next_N = torch.randn(50, 20), torch.randint(20, (50,))
    for precision, limits in LIMITS.items():
        right, wrong = Tally(), Tally()
        right.add(expected_NV, expected_NV, next_N)
        wrong.add(expected_NV, 4 * expected_NV.roll(1, -1), next_N)
        assert failure_of(right, limits, precision, right.mean_kl) is None
        assert failure_of(wrong, limits, precision, wrong.mean_kl) is not None
        assert "own plain prefill" in str(failure_of(right, limits, precision, right.mean_kl, 0.1))
        not_a_number = Tally()
        not_a_number.add(expected_NV, torch.full_like(expected_NV, torch.nan), next_N)
        assert failure_of(not_a_number, limits, precision, not_a_number.mean_kl) is not None


def test_bad_requests(student: Path, exported: Any, tmp_path: Path) -> None:
    for options, match in (
        ({"precision": "fp8"}, "fp8.*allowed are fp32"),
        ({"precision": "fp32", "text_ids": [1] * 10}, "10 tokens; needs at least 64"),
        ({"precision": "fp32", "text_ids": [999] * 90}, "below the vocabulary of 384"),
        ({"precision": "fp32", "text": "a b"}, "needs at least 64"),
    ):
        with pytest.raises(UserError, match=match):
            check_parity(student, exported("ort"), **{**SIZES, **options})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="missing"):
        gate(student, empty)
