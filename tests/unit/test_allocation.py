"""The retention schedule, and the price that brings expected MACs to the budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from distill.allocation import LearnedAllocation, ScheduledAllocation
from distill.optimizer import cosine_scale, make_optimizer, set_learning_rate
from distill.plan import Decision, Plan
from distill.student import BudgetedLinear

SIZE, RANK = 16, 4
DENSE = SIZE * SIZE


def decision(name: str, action: str, rank: int, macs: int) -> Decision:
    return Decision(name, action, rank, macs, SIZE, SIZE, "")  # type: ignore[arg-type]


PLAN = Plan(
    0.5,
    "budgeted",
    "spectral",
    4,
    (
        decision("a", "keep", SIZE, DENSE),
        decision("b", "approximate", RANK, RANK * 2 * SIZE),
        decision("c", "remove", 0, 0),
        decision("d", "narrow", SIZE // 2, DENSE // 2),
    ),
)


def budgeted(rank: int, *, learned: bool = False, dense: bool = True) -> BudgetedLinear:
    return BudgetedLinear(
        torch.randn(SIZE, SIZE) if dense else None,
        torch.randn(SIZE, rank),
        torch.randn(rank, SIZE),
        None,
        learned=learned,
    )


@pytest.fixture
def annealed() -> dict[str, BudgetedLinear]:
    return {"a": budgeted(2), "b": budgeted(RANK), "c": budgeted(0), "d": budgeted(2)}


def test_retention_falls_linearly_and_the_dense_path_goes(
    annealed: dict[str, BudgetedLinear],
) -> None:
    allocation = ScheduledAllocation(annealed, PLAN, first_step=0, anneal_steps=4)
    seen, fractions = [], []
    for step in range(6):
        allocation.before_step(step)
        seen.append((float(annealed["b"].retention), float(annealed["c"].retention)))
        fractions.append(allocation.macs_fraction())
        assert allocation.penalty() is None
        allocation.after_step()
    assert seen == [(d, d) for d in (0.75, 0.5, 0.25, 0, 0, 0)]
    final = PLAN.macs / PLAN.dense_macs
    assert fractions == pytest.approx([final + d * 2 / 4 for d in (0.75, 0.5, 0.25, 0, 0, 0)])
    assert annealed["b"].dense_OI is None and annealed["c"].dense_OI is None
    for stays in (annealed["a"], annealed["d"]):
        assert stays.dense_OI is not None and float(stays.retention) == 1
    assert annealed["c"](torch.randn(3, SIZE)).abs().max() == 0


def test_a_resumed_schedule_needs_only_its_step(annealed: dict[str, BudgetedLinear]) -> None:
    allocation = ScheduledAllocation(annealed, PLAN, first_step=7, anneal_steps=4)
    allocation.load_state(allocation.state())
    allocation.before_step(9)
    assert float(annealed["b"].retention) == 0.25
    assert annealed["b"].dense_OI is not None


def test_without_annealing_the_plan_holds_from_the_start() -> None:
    modules = {"a": budgeted(2), "b": budgeted(RANK, dense=False), "d": budgeted(2)}
    allocation = ScheduledAllocation(modules, PLAN, first_step=0, anneal_steps=0)
    allocation.before_step(0)
    assert allocation.macs_fraction() == pytest.approx(PLAN.macs / PLAN.dense_macs)
    for stays in (modules["a"], modules["d"]):
        assert stays.dense_OI is not None and float(stays.retention) == 1


class Toy(nn.Module):
    """Modules of unequal worth: a loss pulls each one's d and g towards 1 with its own strength."""

    def __init__(self, worth: Sequence[float]) -> None:
        super().__init__()
        self.worth = worth
        self.parts = nn.ModuleList([budgeted(RANK, learned=True) for _ in worth])

    def loss(self) -> Tensor:
        terms = []
        for worth, part in zip(self.worth, self.parts, strict=True):
            missing_rank = (1 - part.gate_R).square().mean()
            terms.append(worth * ((1 - part.retention).square() + missing_rank))
        return torch.stack(terms).sum()


def learn(budget: float, steps: int, *, priced: bool = True) -> tuple[Toy, LearnedAllocation]:
    torch.manual_seed(0)
    toy = Toy([1.0, 0.3, 0.1, 0.03])
    modules = [part for part in toy.parts if isinstance(part, BudgetedLinear)]
    allocation = LearnedAllocation(modules, budget, steps)
    optimizer = make_optimizer(toy, name="muon", learning_rate=1e-3, allocation_rate=0.03)
    for step in range(steps):
        set_learning_rate(optimizer, cosine_scale(step, 5 * steps // 2))
        allocation.before_step(step)
        penalty = allocation.penalty()
        assert penalty is not None
        (toy.loss() + (penalty if priced else 0 * penalty)).backward()
        optimizer.step()
        optimizer.zero_grad()
        allocation.after_step()
    return toy, allocation


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_the_price_brings_expected_macs_to_the_budget(budget: float) -> None:
    toy, allocation = learn(budget, 200)
    assert allocation.macs_fraction() == pytest.approx(budget, abs=0.1)
    retained = [float(part.retention) for part in toy.parts]
    assert retained == sorted(retained, reverse=True) and retained[0] > retained[-1] + 0.2
    for part in toy.parts:
        assert 0 <= float(part.retention) <= 1
        assert 0 <= float(part.gate_R.min()) and float(part.gate_R.max()) <= 1


def test_without_the_price_the_macs_stay_above_the_budget() -> None:
    _, allocation = learn(0.25, 60, priced=False)
    assert allocation.macs_fraction() > 0.9


def test_expected_macs_count_both_paths_and_are_differentiable() -> None:
    modules = [budgeted(RANK, learned=True) for _ in range(2)]
    allocation = LearnedAllocation(modules, 0.5, 10)
    with torch.no_grad():
        modules[0].retention.fill_(0.5)
        modules[1].gate_R.copy_(torch.tensor([1.0, 0.5, 0.0, 0.0]))
    macs = 0.5 * DENSE + RANK * 2 * SIZE + DENSE + 1.5 * 2 * SIZE
    fraction = allocation.expected_fraction()
    assert float(fraction) == pytest.approx(macs / (2 * DENSE))
    fraction.backward()
    assert float(modules[0].retention.grad) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert float(modules[1].gate_R.grad[2]) == pytest.approx(2 * SIZE / (2 * DENSE))  # type: ignore[index]


def test_target_falls_to_the_budget_and_the_price_is_never_negative_and_survives_a_restart() -> (
    None
):
    modules = [budgeted(RANK, learned=True)]
    allocation = LearnedAllocation(modules, 0.2, 4)
    targets = []
    for step in range(6):
        allocation.before_step(step)
        targets.append(allocation.target)
    assert targets == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    allocation.after_step()
    assert allocation.price > 0
    fresh = LearnedAllocation(modules, 0.2, 4)
    fresh.load_state(allocation.state())
    assert fresh.price == allocation.price
    with torch.no_grad():
        modules[0].retention.zero_()
        modules[0].gate_R.zero_()
    for _ in range(50):
        allocation.after_step()
    assert allocation.price == 0
