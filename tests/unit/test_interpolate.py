"""An interpolative student computes what its pairs did, for fewer MACs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import distill.interpolate
from distill.args import DistilArgs
from distill.artifact import UserError
from distill.interpolate import _skeleton
from distill.modeling_budgeted import SkeletonLinear, apply_structure
from distill.opening import check_structure
from distill.plan import (
    Action,
    Module,
    Plan,
    _placed,
    interpolative_names,
    spectral_decisions,
    uniform_decisions,
)
from distill.structure import build_structure
from distill.student import merge
from distill.student_format import count_macs, dense_state, load_student, save_student
from distill.teacher import target_modules
from tests.unit.test_student import LORA_RANK, logits, shake, store_of

Model = Callable[..., PreTrainedModel]
MLP = ("gate_proj", "up_proj", "down_proj")


def interpolative(model: PreTrainedModel, actions: dict[str, tuple[Action, int]]) -> Plan:
    """``actions`` by leaf name of the MLP's projections; attention is approximated in pairs."""
    decisions = []
    for module in store_of(model).modules:
        module = replace(module, interpolative=module.name.endswith(MLP))
        action, rank = actions.get(module.name.rpartition(".")[2], ("approximate", 8))
        macs = module.dense_macs if action == "keep" else module.cost(rank)
        decisions.append(module.decision(action, rank, macs))
    return Plan(0.5, "budgeted", "spectral", 8, _placed(decisions))


def trained(model: PreTrainedModel, plan: Plan) -> None:
    build_structure(model, plan, store_of(model), lora_rank=LORA_RANK, anneal=False)
    shake(model)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * scale)


CASES: dict[str, dict[str, tuple[Action, int]]] = {
    "all": {"gate_proj": ("approximate", 16), "up_proj": ("approximate", 8),
            "down_proj": ("approximate", 16)},
    "gate kept": {"gate_proj": ("keep", 0), "up_proj": ("approximate", 16),
                  "down_proj": ("approximate", 8)},
    "up kept": {"gate_proj": ("approximate", 8), "up_proj": ("keep", 0),
                "down_proj": ("approximate", 16)},
    "down kept": {"gate_proj": ("approximate", 16), "up_proj": ("approximate", 8),
                  "down_proj": ("keep", 0)},
    "up removed": {"gate_proj": ("approximate", 16), "up_proj": ("remove", 0),
                   "down_proj": ("approximate", 8)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merged_interpolative_student_is_the_one_that_was_trained(
    case: str, family: str, tiny_model: Model
) -> None:
    model = tiny_model(family)
    plan = interpolative(model, CASES[case])
    trained(model, plan)
    expected = logits(model)
    merged = merge(model, plan, torch.float32)
    assert_close(logits(merged), expected)
    kinds = {type(m) for n, m in merged.named_modules() if n in plan.skeletons}
    assert kinds == {SkeletonLinear}
    matrices = [p for n, p in merged.named_parameters() if ".layers." in n and p.ndim == 2]
    assert sum(p.numel() for p in matrices) == plan.macs
    plain = tiny_model(family)
    plain.load_state_dict(dense_state(merged))
    assert_close(logits(plain), expected)


@pytest.mark.parametrize("broken", ["_reorder", "_order"])
def test_neurons_out_of_their_order_are_noticed(
    broken: str, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    plan = interpolative(model, CASES["all"])
    trained(model, plan)
    expected = logits(model)
    whole = distill.interpolate._order

    def only_the_reader(linear: torch.nn.Module, order_M: Tensor, *, reads: bool) -> None:
        if reads:
            reorder(linear, order_M, reads=reads)

    reorder = distill.interpolate._reorder
    changed = {
        "_reorder": only_the_reader,
        "_order": lambda mlp, starts: torch.cat([whole(mlp, starts)[:-1], torch.zeros(1).long()]),
    }
    monkeypatch.setattr(distill.interpolate, broken, changed[broken])
    got = logits(merge(model, plan, torch.float32))
    with pytest.raises(AssertionError):
        assert_close(got, expected)


def test_a_saved_interpolative_student_is_loaded_again(
    family: str, tiny_model: Model, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(family)
    plan = interpolative(model, CASES["all"])
    trained(model, plan)
    merged = merge(model, plan, torch.float32)
    save_student(tmp_path, merged, tiny_tokenizer, plan.ranks, plan.skeletons)
    assert count_macs(tmp_path).target == plan.macs
    loaded = load_student(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    with pytest.raises(ValueError, match="skeleton"):
        save_student(tmp_path / "b", merged, tiny_tokenizer, plan.ranks)


@pytest.mark.parametrize(
    ("name", "rank", "start"),
    [
        ("mlp.gate_proj", 16, 128), ("mlp.gate_proj", 64, 0), ("mlp.up_proj", 16, -1),
        ("mlp.down_proj", 16, 1), ("mlp.up_proj", 0, 0), ("mlp.up_proj", 16, "0"),
        ("self_attn.o_proj", 8, 0),
    ],
)  # fmt: skip
def test_a_skeleton_that_does_not_fit_is_refused(
    name: str, rank: int, start: Any, tiny_model: Model
) -> None:
    module = f"model.layers.0.{name}"
    with pytest.raises(ValueError, match="skeleton of"):
        apply_structure(tiny_model("qwen2"), {module: rank}, {module: start})


def test_the_chosen_rows_interpolate_the_others_with_small_weights() -> None:
    """Rows that grow by a factor of a million: leading ones would need weights as large."""
    rows = np.random.default_rng(0).standard_normal((300, 40)) * np.logspace(-3, 3, 300)[:, None]
    chosen = _skeleton(rows)
    assert len(set(chosen)) == 40
    largest = abs(rows @ np.linalg.inv(rows[chosen])).max()
    assert largest < 3 < 1e3 < abs(rows @ np.linalg.inv(rows[:40])).max()


def mlp_modules(neurons: int, hidden: int, energies: np.ndarray) -> list[Module]:
    shapes = {"gate_proj": (neurons, hidden), "up_proj": (neurons, hidden)}
    shapes["down_proj"] = (hidden, neurons)
    return [
        Module(f"model.layers.{layer}.mlp.{kind}", *shape, np.sort(row)[::-1], interpolative=True)
        for layer in range(2)
        for (kind, shape), row in zip(shapes.items(), energies[3 * layer :], strict=False)
    ]


@given(
    st.integers(0, 2**31), st.sampled_from([(96, 32), (64, 64), (48, 96)]), st.floats(0.05, 0.99),
    st.sampled_from([spectral_decisions, uniform_decisions]),
)  # fmt: skip
def test_skeletons_share_no_neuron_and_the_plan_keeps_its_budget(
    seed: int, sizes: tuple[int, int], budget: float, decide: Callable[..., Any]
) -> None:
    neurons, hidden = sizes
    energies = np.random.default_rng(seed).exponential(size=(6, min(sizes))) ** 4
    modules = mlp_modules(neurons, hidden, energies)
    decisions = decide(modules, budget, 8)
    assert sum(d.macs for d in decisions) <= budget * sum(m.dense_macs for m in modules) + 1e-6
    for block in ("model.layers.0.mlp", "model.layers.1.mlp"):
        used = np.zeros(neurons, dtype=int)
        for d in decisions:
            assert (d.skeleton is None) == (d.action != "approximate")
            if d.skeleton is not None:
                assert d.macs == d.rank * (neurons + hidden - d.rank) < d.dense_macs
                if d.module.startswith(block):
                    assert 0 <= d.skeleton <= neurons - d.rank
                    used[d.skeleton : d.skeleton + d.rank] += 1
        assert used.max() <= 1


def test_a_pair_of_less_than_its_rank_is_interpolated_too(tiny_model: Model) -> None:
    """Such as of a matrix of zeros, to which a removed module's dense copy comes."""
    model = tiny_model("llama")
    plan = interpolative(model, CASES["all"])
    trained(model, plan)
    with torch.no_grad():
        for kind, rows in (("gate_proj", slice(None)), ("up_proj", slice(4, None))):
            pair = model.get_submodule(f"model.layers.1.mlp.{kind}")
            pair.down[rows], pair.up[:, rows] = 0, 0
    expected = logits(model)
    merged = merge(model, plan, torch.float32)
    assert_close(logits(merged), expected)
    weights = [p for n, p in merged.named_parameters() if ".mlp." in n]
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in weights)


def test_a_model_whose_mlps_all_have_biases_is_refused(tiny_model: Model) -> None:
    biased, free = (tiny_model("llama", mlp_bias=bias) for bias in (True, False))
    args = DistilArgs(factors="interpolative", rank_multiple=8)
    assert interpolative_names(target_modules(biased)) == set()
    with pytest.raises(UserError, match="every MLP of smollm2-135m has biases.*--factors pair"):
        check_structure(args, biased)
    check_structure(args, free)
    check_structure(replace(args, factors="pair"), biased)
