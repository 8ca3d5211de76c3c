"""What is compared, what is refused, and what happens to an artefact that is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.artifact import UserError, read_json, write_json
from distill.runs import RUNS
from evaluate import prepare
from evaluate.args import parse_evaluate
from evaluate.compare import memory_groups
from evaluate.contenders import find_contenders, model_bytes
from evaluate.original import written_original
from tests.evaluate_runs import all_ranks, export_run, write_run


@pytest.fixture(scope="module")
def runs(
    tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """dense, half (with an fp32 engine), half-svd and lora, all of one teacher."""
    base, teacher = tmp_path_factory.mktemp("contenders"), tiny_dir("llama")
    found = {
        "dense": write_run(base / "dense", teacher),
        "half": write_run(base / "half", teacher, ranks=all_ranks(teacher, 16)),
        "svd": write_run(base / "svd", teacher, method="svd", ranks=all_ranks(teacher, 16)),
        "lora": write_run(base / "lora", teacher, method="lora", noise=0.01),
    }
    export_run(found["half"])
    return found


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / run.name))


def test_every_artefact_of_every_run_is_found_once(runs: dict[str, Path]) -> None:
    lineup = find_contenders([str(runs[name]) for name in ("half", "svd", "lora", "dense")])
    found = {c.id: (c.group, c.engine, c.precision) for c in lineup.contenders}
    assert found == {
        "half/pytorch-fp32": ("budgeted", "pytorch", "fp32"),
        "half/engine-ort-fp32-cpu": ("budgeted", "ort", "fp32"),
        "svd/pytorch-fp32": ("svd", "pytorch", "fp32"),
        "lora/pytorch-fp32": ("lora", "pytorch", "fp32"),
        "dense/pytorch-fp32": ("dense", "pytorch", "fp32"),
    }
    assert (runs["half"] / "onnx" / "ort-fp32").is_dir(), "which the engine replaces"
    assert not lineup.failures
    half = next(c for c in lineup.contenders if c.engine == "ort")
    assert half.macs_fraction == pytest.approx(half.plan.macs / half.plan.dense_macs)
    assert half.directory is not None
    weights = sum(p.stat().st_size for p in half.directory.glob("model.onnx*"))
    assert model_bytes(half.directory) == weights > 0


def test_without_a_name_the_newest_run_is_taken(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(runs["lora"], tmp_path / RUNS)
    monkeypatch.chdir(tmp_path)
    assert [c.run for c in find_contenders([]).contenders] == ["lora"]
    assert [c.run for c in find_contenders(["lora"]).contenders] == ["lora"]
    with pytest.raises(UserError, match="finished runs: lora"):
        find_contenders(["absent"])


@pytest.mark.parametrize("difference", ["teacher", "vocabulary", "tokenizer"])
def test_runs_that_cannot_be_compared_are_refused(
    runs: dict[str, Path], tmp_path: Path, difference: str
) -> None:
    other = copy_of(runs["lora"], tmp_path)
    manifest = read_json(other / "student" / "manifest.json")
    if difference == "teacher":
        manifest["measured"]["teacher_fingerprint"] = "f" * 64
    elif difference == "vocabulary":
        config = other / "student" / "config.json"
        write_json(config, {**read_json(config), "vocab_size": 999})
        reseal(manifest, config)
    else:
        tokenizer = other / "student" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + " ")
        reseal(manifest, tokenizer)
    write_json(other / "student" / "manifest.json", manifest)
    with pytest.raises(UserError) as caught:
        find_contenders([str(runs["half"]), str(other)])
    message = str(caught.value)
    assert difference in message and str(runs["half"]) in message and str(other) in message
    assert "\n" not in message


def reseal(manifest: dict[str, dict[str, object]], path: Path) -> None:
    from distill.artifact import sha256_file

    manifest["files"][path.name] = {
        "size_bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def test_an_engine_whose_hash_changed_is_a_failure_and_the_rest_is_found(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copy_of(runs["half"], tmp_path)
    data = run / "engine-ort" / "fp32-cpu" / "model.onnx"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    lineup = find_contenders([str(run)])
    assert [c.id for c in lineup.contenders] == ["half/pytorch-fp32"]
    (failure,) = lineup.failures
    assert failure.id == "half/engine-ort/fp32-cpu" and failure.stage == "open"
    assert "sha256" in failure.message and str(data) in failure.message


def test_a_student_whose_hash_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copy_of(runs["lora"], tmp_path)
    plan = run / "student" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "budget": 0.1}))
    with pytest.raises(UserError, match=r"plan\.json"):
        find_contenders([str(run)])


def test_contenders_are_grouped_by_memory_with_the_dense_one_in_each(
    runs: dict[str, Path],
) -> None:
    names = ("dense", "half", "svd", "lora")
    contenders = list(find_contenders([str(runs[name]) for name in names]).contenders)
    first = contenders[0].id
    footprints = {c.id: {"model_memory_bytes": 100} for c in contenders}
    one = memory_groups(contenders, footprints, available_bytes=10_000)
    assert [len(group) for group in one] == [5]
    several = memory_groups(contenders, footprints, available_bytes=500)
    assert [len(group) for group in several] == [3, 3]
    assert all(group[0].id == first for group in several)
    tight = memory_groups(contenders, footprints, available_bytes=1)
    assert [len(group) for group in tight] == [2, 2, 2, 2]
    assert {c.id for group in tight for c in group} == set(footprints)


def test_a_wrong_text_is_refused_before_anything_is_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "written_original", lambda found: pytest.fail("too late"))
    argv = ["--run", str(runs["half"]), "--text", str(tmp_path / "none.txt")]
    with pytest.raises(UserError, match="none.txt cannot be read"):
        prepare.prepare(parse_evaluate(argv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_original_is_written_as_the_student_is(
    dtype: torch.dtype, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", tiny_dir("llama"), dtype=dtype)
    dense = written_original(find_contenders([str(run)]))
    assert model_bytes(dense / "student") == model_bytes(run / "student")
