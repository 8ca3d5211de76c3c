"""The knapsack and its competitors: within the budget, optimal, and safely on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.artifact import UserError
from distill.lowrank import break_even_rank
from distill.plan import (
    Decision,
    Module,
    Plan,
    allowed_macs,
    check_rank_multiple,
    keep_decisions,
    knapsack,
    modules_of,
    spectral_decisions,
    uniform_decisions,
)

Decide = Callable[[Sequence[Module], float, int], tuple[Decision, ...]]
BUDGETS = st.floats(0.001, 1.0)
MULTIPLES = st.sampled_from([8, 16, 32, 64])


@st.composite
def modules(draw: st.DrawFn, most: int = 8) -> list[Module]:
    """Shapes of any kind with spectra that decay at any rate, dead ones included."""
    sizes = st.integers(1, 24).map(lambda n: 8 * n) | st.integers(1, 200)
    drawn = []
    for index in range(draw(st.integers(1, most))):
        out_features, in_features = draw(sizes), draw(sizes)
        order = np.arange(min(out_features, in_features))
        scale, decay = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4])), draw(st.floats(0.0, 0.5))
        energy = scale * np.exp(-decay * order)
        drawn.append(Module(f"model.layers.{index}.m", out_features, in_features, energy))
    return drawn


def estimated_loss(modules: Sequence[Module], decisions: Sequence[Decision]) -> float:
    pairs = zip(modules, decisions, strict=True)
    return sum(0.0 if d.action == "keep" else m.lost(d.rank) for m, d in pairs)


def assert_valid(
    modules: Sequence[Module], decisions: Sequence[Decision], budget: float, multiple: int
) -> None:
    """Budget kept, in model order, costs right, ranks useful multiples."""
    assert sum(d.macs for d in decisions) <= budget * sum(m.dense_macs for m in modules) + 1e-6
    assert [d.module for d in decisions] == [m.name for m in modules]
    for module, decision in zip(modules, decisions, strict=True):
        O, I = module.out_features, module.in_features  # noqa: E741
        assert (decision.out_features, decision.in_features) == (O, I)
        if decision.action == "keep":
            assert decision.macs == O * I
        elif decision.action == "remove":
            assert (decision.rank, decision.macs) == (0, 0)
        else:
            assert decision.rank > 0 and decision.rank % multiple == 0
            assert decision.macs == decision.rank * (O + I) < O * I


@pytest.mark.parametrize("decide", [spectral_decisions, uniform_decisions])
@settings(deadline=None, max_examples=60)
@given(modules=modules(), budget=BUDGETS, multiple=MULTIPLES)
def test_no_plan_exceeds_its_budget(
    decide: Decide, modules: list[Module], budget: float, multiple: int
) -> None:
    assert_valid(modules, decide(modules, budget, multiple), budget, multiple)


def test_the_validity_check_notices_what_it_must() -> None:
    module = Module("model.layers.0.m", 64, 64, np.ones(64))
    good = module.decision("approximate", 16, 16 * 128)
    assert_valid([module], [good], 0.5, 8)
    for rank, macs, budget, multiple in [
        (16, 16 * 128, 0.49, 8), (16, 16 * 128, 0.5, 32), (16, 15 * 128, 0.5, 8),
        (32, 32 * 128, 1.0, 8),
    ]:  # fmt: skip
        with pytest.raises(AssertionError):
            assert_valid([module], [module.decision("approximate", rank, macs)], budget, multiple)


@settings(deadline=None, max_examples=40)
@given(modules=modules(), budgets=st.tuples(BUDGETS, BUDGETS).map(sorted), multiple=MULTIPLES)
def test_more_budget_never_costs_more_loss(
    modules: list[Module], budgets: list[float], multiple: int
) -> None:
    low, high = (estimated_loss(modules, spectral_decisions(modules, b, multiple)) for b in budgets)
    assert high <= low * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(modules=modules(), budget=BUDGETS, multiple=MULTIPLES)
def test_the_knapsack_is_never_worse_than_the_uniform_plan(
    modules: list[Module], budget: float, multiple: int
) -> None:
    best = estimated_loss(modules, spectral_decisions(modules, budget, multiple))
    assert best <= estimated_loss(modules, uniform_decisions(modules, budget, multiple)) + 1e-9


def cheapest(costs: list[list[int]], losses: list[np.ndarray], allowed: int) -> float:
    """The least total loss of any choice within ``allowed``, by trying them all."""
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(
        sum(loss[k] for loss, k in zip(losses, choice, strict=True))
        for choice in choices
        if sum(row[k] for row, k in zip(costs, choice, strict=True)) <= allowed
    )


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[list[list[int]], list[np.ndarray], int]:
    unit = draw(st.sampled_from([1, 3, 64]))
    costs, losses = [], []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 4))
        costs.append([0, *(unit * c for c in draw(st.lists(st.integers(1, 30), min_size=count)))])
        costs[-1] = costs[-1][:5]
        values = st.lists(st.floats(0, 10), min_size=len(costs[-1]), max_size=len(costs[-1]))
        losses.append(np.array(draw(values)))
    return costs, losses, draw(st.integers(0, 80 * unit))


@settings(deadline=None, max_examples=150)
@given(case=knapsacks())
def test_the_knapsack_matches_brute_force(
    case: tuple[list[list[int]], list[np.ndarray], int],
) -> None:
    costs, losses, allowed = case
    chosen = knapsack(costs, losses, allowed)
    assert sum(row[k] for row, k in zip(costs, chosen, strict=True)) <= allowed
    total = sum(loss[k] for loss, k in zip(losses, chosen, strict=True))
    assert total == pytest.approx(cheapest(costs, losses, allowed), abs=1e-9)


def test_coarse_cost_units_stay_within_the_budget_and_near_the_optimum() -> None:
    """Costs without a common divisor beyond 65536 states are rounded up, never down."""
    generator = np.random.default_rng(0)
    items, allowed = 6, 5_000_011
    costs = [[0, *sorted(generator.integers(1, 2_000_000, 4).tolist())] for _ in range(items)]
    losses = [np.sort(generator.random(5))[::-1].copy() for _ in range(items)]
    chosen = knapsack(costs, losses, allowed)
    assert sum(row[k] for row, k in zip(costs, chosen, strict=True)) <= allowed
    total = sum(float(loss[k]) for loss, k in zip(losses, chosen, strict=True))
    slack = items * (allowed // 65536 + 1)
    assert cheapest(costs, losses, allowed) <= total + 1e-12
    assert total <= cheapest(costs, losses, allowed - slack) + 1e-12


def example() -> list[Module]:
    """Module 0 matters at every rank, 1 at low rank only, 2 not at all."""
    flat, steep = np.full(64, 10.0), np.where(np.arange(64) < 16, 5.0, 1e-6)
    spectra = {"q_proj": flat, "k_proj": steep, "v_proj": np.zeros(64)}
    return [Module(f"model.layers.0.{n}", 64, 64, e) for n, e in spectra.items()]


def test_the_plan_keeps_what_matters_and_removes_what_does_not() -> None:
    decisions = spectral_decisions(example(), 0.5, 16)
    assert [(d.action, d.rank) for d in decisions] == [
        ("keep", 64), ("approximate", 16), ("remove", 0)
    ]  # fmt: skip
    assert "nats" in decisions[1].reason


def test_uniform_spends_the_same_share_everywhere_and_then_the_remainder() -> None:
    assert [d.rank for d in uniform_decisions(example(), 0.5, 16)] == [16, 16, 16]
    assert [d.rank for d in uniform_decisions(example(), 0.34, 16)] == [16, 16, 0]
    assert all(d.action == "keep" for d in uniform_decisions(example(), 1.0, 16))


def test_the_whole_budget_keeps_everything() -> None:
    modules = [m for m in example() if m.energy_K.any()]
    assert {d.action for d in spectral_decisions(modules, 1.0, 8)} == {"keep"}
    kept = keep_decisions(modules)
    assert sum(d.macs for d in kept) == allowed_macs(modules, 1.0)
    assert Plan(1.0, "lora", "keep", 32, kept).ranks == {}


def test_options_rise_in_cost_and_end_dense() -> None:
    options = Module("m", 128, 64, np.ones(64)).options(8)
    assert [d.action for d in options][:2] == ["remove", "approximate"]
    assert [d.rank for d in options] == [0, 8, 16, 24, 32, 40, 64]
    assert [d.macs for d in options] == sorted(d.macs for d in options)
    assert options[-2].rank <= break_even_rank(128, 64) < options[-2].rank + 8


def test_a_rank_multiple_that_fits_no_module_is_refused() -> None:
    tiny = modules_of({"a": nn.Linear(48, 32), "b": nn.Linear(16, 16)})
    check_rank_multiple(tiny, 16)
    with pytest.raises(UserError, match="--rank-multiple 32.*19.*8, 16"):
        check_rank_multiple(tiny, 32)


@pytest.fixture
def plan() -> Plan:
    return Plan(0.5, "budgeted", "spectral", 16, spectral_decisions(example(), 0.5, 16))


def test_a_saved_plan_loads_equal(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.ranks == {"model.layers.0.k_proj": 16, "model.layers.0.v_proj": 0}
    assert (loaded.macs, loaded.dense_macs) == (64 * 64 + 16 * 128, 3 * 64 * 64)
    assert plan.to_json()["macs"] == plan.macs <= 0.5 * plan.to_json()["dense_macs"]


def test_a_truncated_missing_or_foreign_plan_is_one_clear_line(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "", "[]", "{}", whole.replace('"rank"', '"rnk"')):
        path.write_text(broken)
        with pytest.raises(UserError, match="plan.json") as caught:
            Plan.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="absent.json"):
        Plan.load(tmp_path / "absent.json")
