"""Sequential refit: equal streams change nothing, drifted ones come closer; a twin that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import refit
from distill.data import plain
from distill.factors import FactorStore, factor_model
from distill.plan import Mlp, Plan, keep_decisions, spectral_decisions, units_of
from distill.refit import refit_modules, refitted_weight
from distill.structure import build_structure

TOKENS = 48


def calibration(rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(3, 380, (rows, TOKENS)).astype(np.int32)


def store_of(model: PreTrainedModel, directory: Path, mlp: str = "pair") -> FactorStore:
    return factor_model(
        model, plain(calibration(8)), directory / "factors",
        form="pair" if mlp == "pair" else "narrow",
        memory_bytes=2**30, micro_batch=4, answer_weight=1.0, seed=0,
    )  # fmt: skip


def student_of(
    model: PreTrainedModel, store: FactorStore, budget: float, mlp: str = "pair"
) -> PreTrainedModel:
    """Of pairs; with MLPs narrowed by the knapsack ("narrow"); or narrowed to half their neurons
    with all else kept ("halved")."""
    student = copy.deepcopy(model)
    units = units_of(store.modules, store.neurons)
    decided = keep_decisions(store.modules)
    if mlp == "halved":
        halves = [u.options(64)[1 if isinstance(u, Mlp) else -1] for u in units]
        decided = tuple(d for option in halves for d in option.decisions)
    elif budget < 1:
        decided = spectral_decisions(units, budget, 8)
    plan = Plan(budget, "budgeted", "spectral", 8, decided)
    assert bool(plan.widths) == (mlp != "pair")
    build_structure(student, plan, store, lora_rank=4, anneal=False)
    return student


def stream_error(model: PreTrainedModel, student: PreTrainedModel, ids_NT: np.ndarray) -> float:
    """Squared error of the last hidden states, relative to the teacher's own."""
    ids = torch.from_numpy(ids_NT.astype(np.int64))
    with torch.no_grad():
        ours, theirs = (m.model(input_ids=ids).last_hidden_state for m in (student, model))
    return float((ours - theirs).square().sum() / theirs.square().sum())


def test_equal_inputs_leave_the_weight_alone() -> None:
    weight, x = torch.randn(5, 7), torch.randn(7, 30)
    same = refitted_weight(weight, weight @ x @ x.T, x @ x.T)
    torch.testing.assert_close(same.float(), weight, rtol=1e-4, atol=1e-4)
    drifted = refitted_weight(weight, 0.5 * weight @ x @ x.T, x @ x.T)
    assert (drifted - weight).norm() > 0.1 * weight.norm()


def test_the_weight_makes_up_for_what_the_stream_lacks() -> None:
    """Where the target has more than W x, and x explains it linearly, W* = W + that linear map."""
    weight, missing, x = torch.randn(5, 7), torch.randn(5, 7), torch.randn(7, 4000)
    got = refitted_weight(weight, (weight + missing) @ x @ x.T, x @ x.T)
    assert (got - weight - missing).norm() < 0.05 * missing.norm()


def test_a_student_that_keeps_everything_is_not_changed(
    family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(family)
    store = store_of(model, tmp_path)
    student = student_of(model, store, 1.0)
    refit_modules(model, student, store, calibration(4), 2)
    assert stream_error(model, student, calibration(2)) < 1e-8


@pytest.mark.parametrize("mlp", ["pair", "narrow", "halved"])
def test_refitting_brings_the_stream_closer_on_text_it_has_not_seen(
    mlp: str, family: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(family)
    store = store_of(model, tmp_path, mlp)
    student = student_of(model, store, 0.5, mlp)
    fresh = np.random.default_rng(9).integers(3, 380, (8, TOKENS)).astype(np.int32)
    seen = calibration(64)
    before, before_seen = (stream_error(model, student, ids) for ids in (fresh, seen))
    refit_modules(model, student, store, seen, 8)
    assert stream_error(model, student, fresh) < 0.9 * before
    assert stream_error(model, student, seen) < 0.9 * before_seen


@pytest.mark.parametrize("mlp", ["pair", "halved"])
@pytest.mark.parametrize("of", ["llama", "gemma3_text"])
def test_the_twin_that_turns_the_correction_round_is_worse(
    of: str,
    mlp: str,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(of)
    store = store_of(model, tmp_path, mlp)
    student = student_of(model, store, 0.5, mlp)
    fresh = np.random.default_rng(9).integers(3, 380, (8, TOKENS)).astype(np.int32)
    before = stream_error(model, student, fresh)
    right = refit.refitted_weight

    def wrong(weight: Tensor, target: Tensor, own: Tensor) -> Tensor:
        return right(weight, 2 * weight.double() @ own.double() - target, own)

    monkeypatch.setattr(refit, "refitted_weight", wrong)
    refit_modules(model, student, store, calibration(64), 8)
    assert stream_error(model, student, fresh) > 0.9 * before


@pytest.mark.parametrize(
    ("of", "settings"), [("llama", {}), ("llama", {"mlp_bias": True}), ("gemma3_text", {})]
)
def test_a_narrowed_down_proj_is_refitted_to_the_teachers_whole_output(
    of: str, settings: dict[str, bool], tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """In the first layer, where all else is kept, it is the least-squares map (to a ridge towards
    what it was) from the neurons that stay to what the teacher's MLP computes."""
    model = tiny_model(of, **settings)
    store = store_of(model, tmp_path, "halved")
    student = student_of(model, store, 1.0, "halved")
    ids_NT, name = calibration(16), "model.layers.0.mlp.down_proj"
    narrow = student.get_submodule(name)
    before_OK = narrow.dense_OI.clone()
    refit_modules(model, student, store, ids_NT, 4)
    (h_NK, _), (_, y_NO) = (read_and_written(m, name, ids_NT) for m in (student, model))
    y_NO -= 0 if narrow.bias is None else narrow.bias
    best_OK = refitted_weight(before_OK, y_NO.T @ h_NK, h_NK.T @ h_NK).float()
    torch.testing.assert_close(narrow.dense_OI, best_OK, rtol=1e-2, atol=1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(before_OK, best_OK, rtol=1e-2, atol=1e-3)


def read_and_written(
    model: PreTrainedModel, name: str, ids_NT: np.ndarray
) -> tuple[Tensor, Tensor]:
    found: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: found.extend((args[0], out)))
    with torch.no_grad():
        model.model(input_ids=torch.from_numpy(ids_NT.astype(np.int64)))
    handle.remove()
    read_BTI, written_BTO = found
    return read_BTI.flatten(0, 1), written_BTO.flatten(0, 1)


def test_a_weight_counts_as_so_many_copies(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    store = store_of(model, tmp_path)
    ids_NT, repeated = calibration(6), [0, 0, 0, 1, 2, 3, 3, 4, 5]
    weights_NT = torch.ones(ids_NT.shape)
    weights_NT[[0, 3]] = torch.tensor([3.0, 2.0])[:, None]
    students = [student_of(model, store, 0.5) for _ in range(3)]
    refit_modules(model, students[0], store, ids_NT, 1, weights_NT=weights_NT)
    refit_modules(model, students[1], store, ids_NT[repeated], 1)
    refit_modules(model, students[2], store, ids_NT, 1)
    weighted, copied, plain_one = (stream_error(model, s, ids_NT) for s in students)
    assert weighted == pytest.approx(copied, rel=1e-3)
    assert plain_one != pytest.approx(copied, rel=1e-3)
