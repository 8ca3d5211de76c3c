"""The knapsack and its competitors: within the budget, optimal, and safely on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.artifact import UserError
from distill.lowrank import break_even_rank
from distill.plan import (
    Decision,
    Mlp,
    Module,
    Plan,
    Unit,
    allowed_macs,
    check_rank_multiple,
    keep_decisions,
    knapsack,
    modules_of,
    spectral_decisions,
    uniform_decisions,
    units_of,
)

Decide = Callable[[Sequence[Unit], float, int], tuple[Decision, ...]]
BUDGETS = st.floats(0.001, 1.0)
MULTIPLES = st.sampled_from([8, 16, 32, 64])
SIZES = st.sampled_from([8, 24, 30, 64, 96, 136])


@st.composite
def modules(draw: st.DrawFn, most: int = 6) -> list[Module]:
    """Shapes of any kind with spectra that decay at any rate, dead ones included."""
    sizes = st.integers(1, 24).map(lambda n: 8 * n) | st.integers(1, 200)
    drawn = []
    for index in range(draw(st.integers(1, most))):
        out_features, in_features = draw(sizes), draw(sizes)
        energy = draw(energies(min(out_features, in_features)))
        drawn.append(Module(f"model.layers.{index}.m", out_features, in_features, energy))
    return drawn


@st.composite
def energies(draw: st.DrawFn, count: int) -> np.ndarray:
    scale, decay = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4])), draw(st.floats(0.0, 0.5))
    return scale * np.exp(-decay * np.arange(count))


@st.composite
def units(draw: st.DrawFn) -> list[Unit]:
    """Modules by themselves, and MLPs whose projections may go narrow together or may not."""
    shapes, neurons = draw(modules()), {}
    for index in range(draw(st.integers(0, 3))):
        block, count = f"model.layers.{index}.mlp", draw(SIZES)
        shapes += mlp_modules(block, count, draw(SIZES))
        if draw(st.booleans()):  # what goes last need not be worth most
            shuffle = np.random.default_rng(draw(st.integers(0, 999)))
            neurons[block] = shuffle.permutation(draw(energies(count)))
    return units_of(shapes, neurons)


def mlp_modules(block: str, count: int, hidden: int) -> list[Module]:
    shapes = {"gate_proj": (count, hidden), "up_proj": (count, hidden)}
    shapes["down_proj"] = (hidden, count)
    return [
        Module(f"{block}.{leaf}", *shape, np.linspace(2, 0, min(shape)))
        for leaf, shape in shapes.items()
    ]


def members(unit: Unit) -> tuple[Module, ...]:
    return unit.modules if isinstance(unit, Mlp) else (unit,)


def decided(units: Sequence[Unit], decisions: Sequence[Decision]) -> Iterator[tuple]:
    """Every unit with its decisions, one a module, in model order."""
    assert [d.module for d in decisions] == [m.name for u in units for m in members(u)]
    left = iter(decisions)
    for unit in units:
        yield unit, [next(left) for _ in members(unit)]


def estimated_loss(units: Sequence[Unit], decisions: Sequence[Decision]) -> float:
    total = 0.0
    for unit, (first, *_) in decided(units, decisions):
        energy = unit.energy_M if isinstance(unit, Mlp) else unit.energy_K
        total += 0.0 if first.action == "keep" else 0.5 * float(energy[first.rank :].sum())
    return total


def assert_valid(
    units: Sequence[Unit], decisions: Sequence[Decision], budget: float, multiple: int
) -> None:
    """Budget kept, in model order, costs right, ranks and widths useful multiples, MLPs agreed."""
    assert sum(d.macs for d in decisions) <= budget * sum(u.dense_macs for u in units) + 1e-6
    for unit, chosen in decided(units, decisions):
        together = isinstance(unit, Mlp)
        assert len({d.action for d in chosen}) == 1
        for module, decision in zip(members(unit), chosen, strict=True):
            O, I = module.out_features, module.in_features  # noqa: E741
            assert (decision.out_features, decision.in_features) == (O, I)
            if decision.action == "keep":
                assert decision.macs == O * I
            elif decision.action == "remove":
                assert (decision.rank, decision.macs) == (0, 0)
            elif decision.action == "narrow":
                assert together and decision.rank == chosen[0].rank
                neurons = I if module.name.endswith("down_proj") else O
                assert 0 < decision.rank < neurons and decision.rank % multiple == 0
                assert decision.macs == decision.rank * (O * I // neurons)
            else:
                assert not together and decision.rank > 0 and decision.rank % multiple == 0
                assert decision.macs == decision.rank * (O + I) < O * I


@pytest.mark.parametrize("decide", [spectral_decisions, uniform_decisions])
@settings(deadline=None, max_examples=80)
@given(units=units(), budget=BUDGETS, multiple=MULTIPLES)
def test_no_plan_exceeds_its_budget(
    decide: Decide, units: list[Unit], budget: float, multiple: int
) -> None:
    assert_valid(units, decide(units, budget, multiple), budget, multiple)


def test_the_validity_check_notices_what_it_must() -> None:
    module = Module("model.layers.0.m", 64, 64, np.ones(64))
    good = module.decision("approximate", 16, 16 * 128, 0.0)
    assert_valid([module], [good], 0.5, 8)
    for rank, macs, budget, multiple in [
        (16, 16 * 128, 0.49, 8), (16, 16 * 128, 0.5, 32), (16, 15 * 128, 0.5, 8),
        (32, 32 * 128, 1.0, 8),
    ]:  # fmt: skip
        bad = module.decision("approximate", rank, macs, 0.0)
        with pytest.raises(AssertionError):
            assert_valid([module], [bad], budget, multiple)


def test_the_validity_check_notices_an_mlp_that_does_not_agree() -> None:
    mlp = Mlp(tuple(mlp_modules("model.layers.0.mlp", 64, 24)), np.ones(64))
    narrow, wider = (mlp.options(8)[k].decisions for k in (2, 3))
    assert_valid([mlp], narrow, 0.25, 8)
    pair = replace(narrow[1], action="approximate", rank=8, macs=8 * 88)
    kept, removed = (mlp.options(8)[k].decisions[1] for k in (-1, 0))
    cheaper = replace(narrow[1], macs=narrow[1].macs - 24)
    for other in (wider[1], pair, kept, removed, cheaper, replace(narrow[1], out_features=16)):
        with pytest.raises(AssertionError):
            assert_valid([mlp], [narrow[0], other, narrow[2]], 1.0, 8)
    for budget, multiple in ((0.24, 8), (0.25, 32)):
        with pytest.raises(AssertionError):
            assert_valid([mlp], narrow, budget, multiple)
    with pytest.raises(AssertionError):
        assert_valid([mlp], narrow[::-1], 0.25, 8)


@settings(deadline=None, max_examples=40)
@given(units=units(), budgets=st.tuples(BUDGETS, BUDGETS).map(sorted), multiple=MULTIPLES)
def test_more_budget_never_costs_more_loss(
    units: list[Unit], budgets: list[float], multiple: int
) -> None:
    with exact_costs():
        plans = [spectral_decisions(units, budget, multiple) for budget in budgets]
    low, high = (estimated_loss(units, decisions) for decisions in plans)
    assert high <= low * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(units=units(), budget=BUDGETS, multiple=MULTIPLES)
def test_the_knapsack_is_never_worse_than_the_uniform_plan(
    units: list[Unit], budget: float, multiple: int
) -> None:
    with exact_costs():
        best = estimated_loss(units, spectral_decisions(units, budget, multiple))
    assert best <= estimated_loss(units, uniform_decisions(units, budget, multiple)) + 1e-9


def exact_costs() -> Any:
    """A knapsack that never rounds costs: what is proved of it holds but for rounding otherwise."""
    return mock.patch("distill.plan.MAX_COST_UNITS", 1 << 20)


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
    decisions = [d for option in options for d in option.decisions]
    assert [d.action for d in decisions] == ["remove", *["approximate"] * 5, "keep"]
    assert [d.rank for d in decisions] == [0, 8, 16, 24, 32, 40, 64]
    assert [o.macs for o in options] == [d.macs for d in decisions]
    assert [o.macs for o in options] == sorted(o.macs for o in options)
    assert [o.loss for o in options] == [32, 28, 24, 20, 16, 12, 0]
    assert decisions[-2].rank <= break_even_rank(128, 64) < decisions[-2].rank + 8


def test_an_mlp_has_every_width_below_its_own() -> None:
    mlp = Mlp(tuple(mlp_modules("model.layers.0.mlp", 40, 16)), np.arange(40.0, 0, -1))
    options = mlp.options(16)
    kinds = [{(d.action, d.rank) for d in option.decisions} for option in options]
    assert kinds == [{("remove", 0)}, {("narrow", 16)}, {("narrow", 32)}, {("keep", 16)}]
    assert [o.macs for o in options] == [3 * 16 * width for width in (0, 16, 32, 40)]
    assert [o.loss for o in options] == [410, 150, 18, 0]
    widths = [o.decisions[0].rank for o in mlp.options(8)]
    assert widths == [0, 8, 16, 24, 32, 16]
    assert [o.decisions[0].action for o in mlp.options(40)] == ["remove", "keep"]


def test_the_projections_of_a_ranked_mlp_are_one_unit_in_their_place() -> None:
    first, second = (mlp_modules(f"model.layers.{layer}.mlp", 16, 8) for layer in (0, 1))
    q, last = (Module(f"model.layers.{n}.self_attn.q_proj", 8, 8, np.ones(8)) for n in (1, 2))
    shapes, worth = [*first, q, *second, last], np.ones(16)
    assert units_of(shapes, {}) == shapes
    units = units_of(shapes, {"model.layers.1.mlp": worth})
    assert units[:4] == shapes[:4] and units[-1] is last
    assert isinstance(units[4], Mlp) and len(units) == 6
    assert units[4].modules == tuple(second) and units[4].energy_M is worth
    assert units[4].dense_macs == 3 * 16 * 8


def test_narrow_mlps_and_modules_share_one_budget() -> None:
    """The MLP's first sixteen neurons and the q_proj are worth something, nothing else is."""
    mlp = Mlp(tuple(mlp_modules("model.layers.0.mlp", 64, 64)), np.repeat([5.0, 0.0], [16, 48]))
    q, v = (Module(f"model.layers.0.self_attn.{n}", 64, 64, e) for n, e in
            (("q_proj", np.full(64, 10.0)), ("v_proj", np.zeros(64))))  # fmt: skip
    decisions = spectral_decisions([q, v, mlp], (64 * 64 + 3 * 16 * 64) / (5 * 64 * 64), 16)
    assert [(d.action, d.rank) for d in decisions] == [
        ("keep", 64), ("remove", 0), *[("narrow", 16)] * 3
    ]  # fmt: skip
    even = uniform_decisions([q, v, mlp], 0.5, 16)
    assert [d.rank for d in even] == [16, 16, 32, 32, 32]


def test_a_rank_multiple_that_fits_no_module_is_refused() -> None:
    tiny = modules_of({"a": nn.Linear(48, 32), "b": nn.Linear(16, 16)})
    check_rank_multiple(tiny, 16)
    with pytest.raises(UserError, match="--rank-multiple 32.*19.*8, 16"):
        check_rank_multiple(tiny, 32)
    check_rank_multiple([Mlp(tuple(mlp_modules("m.mlp", 33, 8)), np.ones(33))], 32)


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


def test_a_saved_plan_knows_the_widths_of_its_mlps(tmp_path: Path) -> None:
    mlps = [Mlp(tuple(mlp_modules(f"model.layers.{n}.mlp", 64, 64)), np.ones(64)) for n in range(3)]
    decisions = [d for mlp, k in zip(mlps, (2, -1, 0), strict=True) for d in chosen(mlp, k)]
    made = Plan(0.5, "budgeted", "spectral", 16, tuple(decisions))
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made and loaded.widths == {"model.layers.0.mlp": 32}
    removed = {m.name: 0 for m in mlps[2].modules}
    assert loaded.ranks == removed
    assert loaded.macs == 3 * 64 * 64 + 3 * 32 * 64


def chosen(mlp: Mlp, option: int) -> tuple[Decision, ...]:
    return mlp.options(16)[option].decisions


def test_an_mlp_of_fewer_neurons_than_the_multiple_is_kept_or_removed() -> None:
    options = Mlp(tuple(mlp_modules("m.mlp", 24, 8)), np.ones(24)).options(32)
    assert [{d.action for d in o.decisions} for o in options] == [{"remove"}, {"keep"}]


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
