"""Every method, allocation, family and budget: the student keeps what its flags promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from distill.artifact import UserError, open_artifact
from distill.plan import Plan
from distill.student_format import count_macs, dense_macs_from_config, load_student
from tests.e2e.faults import STEPS, call, command

CASES = {
    "spectral": ("0.05", "--allocation spectral"),
    "spectral, half": ("0.5", "--allocation spectral --dense-copy"),
    "spectral, most": ("0.8", "--allocation spectral"),
    "annealed": ("0.3", "--mlp pair --anneal 0.5"),
    "learned": ("0.5", "--allocation learned"),
    "learned, annealed": ("0.25", "--allocation learned --mlp pair --anneal 0.5"),
    "edge, nearly all": ("0.95", "--allocation spectral"),
    "edge, learned": ("0.25", "--allocation learned"),
    "learned with a prior": ("0.5", "--allocation spectral+learned"),
    "pairs": ("0.3", "--mlp pair --dense-copy"),
    "pairs, learned": ("0.6", "--mlp pair --allocation spectral+learned"),
    "pairs, uniform": ("0.9", "--mlp pair --allocation uniform"),
    "uniform": ("0.25", "--allocation uniform"),
    "uniform, least": ("0.05", "--allocation uniform"),
    "svd": ("0.4", "--method svd"),
    "adamw, live, checkpointed": (
        "0.6",
        "--optimizer adamw --teacher-pass live --gradient-checkpointing",
    ),
    "hidden-state term": ("0.5", "--hidden-weight 4"),
}
IDS_BT = torch.arange(3, 40).repeat(2, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One parent of all runs, so that they share text, statistics and the teacher's outputs."""
    return tmp_path_factory.mktemp("runs")


def stored_shapes(student: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(student / "model.safetensors", framework="pt") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}


def assert_plan_matches(plan: Plan, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every decision is what the tensors say, and no matrix in the layers is unaccounted for."""
    expected: dict[str, tuple[int, ...]] = {}
    for d in plan.decisions:
        if d.action == "keep":
            expected[f"{d.module}.weight"] = (d.out_features, d.in_features)
        elif d.action == "narrow":
            reads = d.module.endswith("down_proj")
            shape = (d.out_features, d.rank) if reads else (d.rank, d.in_features)
            expected[f"{d.module}.weight"] = shape
        elif d.action == "approximate":
            expected[f"{d.module}.down.weight"] = (d.rank, d.in_features)
            expected[f"{d.module}.up.weight"] = (d.out_features, d.rank)
    found = {n: s for n, s in shapes.items() if ".layers." in n and len(s) == 2}
    assert found == expected


def assert_full_rank(plan: Plan, student: Path) -> None:
    """Neurons that stay are whole: their weights are not what a LoRA adapter alone could make."""
    tensors = load_file(student / "model.safetensors")
    for d in plan.decisions:
        if d.action == "narrow":
            weight = tensors[f"{d.module}.weight"].float()
            assert torch.linalg.matrix_rank(weight) == min(weight.shape)
            assert weight.norm() > 0.5 * min(weight.shape) ** 0.5


def assert_within(budget: str, student: Path, teacher: Path) -> None:
    dense = dense_macs_from_config(AutoConfig.from_pretrained(teacher)).target
    assert dense == count_macs(teacher).target
    assert 0 < count_macs(student).target <= Fraction(budget) * dense


def assert_sound(run: Path, teacher: Path, budget: str) -> Plan:
    """A verified artefact within its budget whose tensors, plan and pictures agree."""
    student = run / "student"
    manifest = open_artifact(student, "student")
    plan = Plan.load(student / "plan.json")
    assert_within(budget, student, teacher)
    assert_plan_matches(plan, stored_shapes(student))
    assert plan.macs == count_macs(student).target == manifest["measured"]["student"]["target_macs"]
    assert (run / "plan.json").read_text() == (student / "plan.json").read_text()
    assert all((run / name).stat().st_size > 1000 for name in ("modules.png",))
    model = load_student(student, torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(IDS_BT).logits).all()
        written = model.generate(IDS_BT, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert written.shape == (2, IDS_BT.shape[1] + 4)
    return plan


def logits_of(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_student(directory, torch.float32)(IDS_BT).logits


def logged(run: Path, key: str) -> list[float]:
    """Its value in every step of the training log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines
    return [line[key] for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_every_allocation_keeps_its_budget(
    case: str, teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget, flags = CASES[case]
    run = runs / case
    ended = call(capsys, command(teacher, run, "--budget", budget, *flags.split(), tokens="1280"))
    assert ended.status == 0, ended.err
    plan = assert_sound(run, teacher, budget)
    assert {d.action for d in plan.decisions} != {"keep"}
    if not case.startswith("edge"):  # where every MLP may be kept or removed
        assert bool(plan.widths) != ("--mlp pair" in flags or "--method svd" in flags)
    assert_full_rank(plan, run / "student")
    assert all((value > 0) == ("hidden" in case) for value in logged(run, "hidden"))
    after_plan = logged(run, "macs_fraction")[2 if "learned" in case else 0 :]
    assert (after_plan[0] > float(budget) + 0.1) == ("annealed" in case)
    assert after_plan[-1] <= float(budget)
    if "--dense-copy" in flags:
        copied, student = logits_of(run / "student-dense"), logits_of(run / "student")
        torch.testing.assert_close(copied, student, rtol=0, atol=1e-4)
    assert str(run / "student") in ended.out
    assert not any((run / n).exists() for n in ("checkpoint", "allocated", "allocated-factors"))


def test_the_dense_copy_computes_the_same(
    teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "copied"
    assert call(capsys, command(teacher, run, "--dense-copy", tokens="512")).status == 0
    config = json.loads((run / "student-dense" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert set(stored_shapes(run / "student-dense")) == set(stored_shapes(teacher))
    copied, student = logits_of(run / "student-dense"), logits_of(run / "student")
    torch.testing.assert_close(copied, student, rtol=0, atol=1e-4)
    assert (logits_of(teacher) - student).abs().max() > 1e-2


def test_the_checks_notice_a_wrong_plan_and_a_changed_file(
    teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "broken"
    assert call(capsys, command(teacher, run, "--budget", "0.5", tokens="512")).status == 0
    student = run / "student"
    plan, shapes = Plan.load(student / "plan.json"), stored_shapes(student)
    for action in ("approximate", "narrow"):
        other = next(d for d in plan.decisions if d.action == action)
        wrong = tuple(replace(d, rank=d.rank + 8) if d is other else d for d in plan.decisions)
        with pytest.raises(AssertionError):
            assert_plan_matches(replace(plan, decisions=wrong), shapes)
    with pytest.raises(AssertionError):
        assert_within(str(plan.macs / plan.dense_macs - 1e-6), student, teacher)
    tensors = load_file(student / "model.safetensors")
    narrow = tensors[f"{other.module}.weight"]
    narrow.copy_(narrow[:1].expand_as(narrow).clone())
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError):
        assert_full_rank(plan, student)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors"):
        assert_sound(run, teacher, "0.5")


@pytest.mark.parametrize("method", ["budgeted", "svd"])
def test_a_budget_of_one_is_the_dense_original(
    method: str, teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / f"one-{method}"
    argv = command(teacher, run, "--budget", "1", "--method", method, tokens="256")
    assert call(capsys, argv).status == 0
    plan = assert_sound(run, teacher, "1")
    assert {d.action for d in plan.decisions} == {"keep"}
    assert torch.equal(logits_of(run / "student"), logits_of(teacher))
    tensors = load_file(run / "student" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, run / "student" / "model.safetensors", {"format": "pt"})
    assert not torch.equal(logits_of(run / "student"), logits_of(teacher))


def test_lora_is_merged_into_the_plain_architecture(
    teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "lora"
    argv = command(teacher, run, "--method", "lora", "--student", str(teacher), tokens="512")
    ended = call(capsys, argv)
    assert ended.status == 0, ended.err
    plan = assert_sound(run, teacher, "1")
    assert plan.macs == plan.dense_macs
    assert set(stored_shapes(run / "student")) == set(stored_shapes(teacher))


def test_every_family(
    family: str, tiny_dir: Callable[..., Path], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tiny_dir(family), runs / family
    ended = call(capsys, command(source, run, "--budget", "0.4", tokens="768"))
    assert ended.status == 0, ended.err
    assert_sound(run, source, "0.4")
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["base_model_type"] == family


def test_a_student_may_start_from_another_model(
    teacher: Path,
    tiny_dir: Callable[..., Path],
    runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of another width and depth: the hidden-state term falls away and the rest still works."""
    source = tiny_dir("llama", seed=7, num_hidden_layers=2, intermediate_size=96)
    run = runs / "other"
    argv = command(teacher, run, "--student", str(source), "--budget", "0.6", tokens="512")
    ended = call(capsys, [*argv, "--hidden-weight", "4"])
    assert ended.status == 0, ended.err
    assert set(logged(run, "hidden")) == {0.0}
    plan = assert_sound(run, source, "0.6")
    assert {d.module.split(".")[2] for d in plan.decisions} == {"0", "1"}


def test_training_brings_the_student_closer(whole: Callable[..., Path]) -> None:
    run = whole("--learning-rate", "1e-2")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    first, last = (sum(line["loss"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last < 0.95 * first
    assert all(line["macs_fraction"] <= 0.25 for line in lines)


def test_a_plan_alone_is_printed_and_nothing_else_is_written(
    teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "plan"
    ended = call(capsys, command(teacher, run, "--plan-only", "--budget", "0.3", tokens="512"))
    assert ended.status == 0, ended.err
    plan = Plan.load(run / "plan.json")
    assert plan.macs <= 0.3 * plan.dense_macs
    assert "plan.json" in ended.out and not (run / "student").exists()
    assert call(capsys, command(teacher, run, "--budget", "0.3", tokens="512")).status == 0
    assert Plan.load(run / "student" / "plan.json").decisions == plan.decisions


def test_overwrite_replaces_a_finished_student(
    teacher: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "twice"
    assert call(capsys, command(teacher, run, "--budget", "0.6", tokens="512")).status == 0
    argv = command(teacher, run, "--budget", "0.3", "--overwrite", tokens="512")
    assert call(capsys, argv).status == 0
    assert_sound(run, teacher, "0.3")
