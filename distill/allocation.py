"""How dense retention d and rank gates g move during training.

``ScheduledAllocation`` follows a fixed plan: d of each approximated module falls from 1 to 0 (or is
gone from the start). ``LearnedAllocation`` learns d and g: a dual multiplier λ prices every MAC so
that the expected MACs follow the scheduled budget F(t), which falls linearly from 1 to F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.plan import Plan
from distill.student import BudgetedLinear

DUAL_RATE = 0.5
STIFFNESS = 10.0


class ScheduledAllocation:
    """d falls from 1 to 0 over the ``anneal_steps`` that follow ``first_step``, in the modules that
    the plan approximates or removes; with ``anneal_steps`` 0 their dense path must already be gone.
    """

    def __init__(
        self,
        modules: Mapping[str, BudgetedLinear],
        plan: Plan,
        first_step: int,
        anneal_steps: int,
    ) -> None:
        fading = {d.module for d in plan.decisions if d.action in ("approximate", "remove")}
        self.annealed = [m for n, m in modules.items() if n in fading and m.dense_OI is not None]
        self.plan, self.first_step, self.anneal_steps = plan, first_step, anneal_steps

    def before_step(self, step: int) -> None:
        done = step + 1 - self.first_step
        retention = max(0.0, 1 - done / self.anneal_steps) if self.anneal_steps else 0.0
        for module in self.annealed:
            module.retention.fill_(retention)
            if retention == 0:
                module.dense_OI = None
        if retention == 0:
            self.annealed = []

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self) -> None:
        return None

    def macs_fraction(self) -> float:
        """MACs of the paths that are still computed, weighted by d, over the dense MACs."""
        dense = sum(float(m.retention) * m.dense_macs for m in self.annealed)
        return (self.plan.macs + dense) / self.plan.dense_macs

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        return None


class LearnedAllocation:
    """Price on expected MACs Σ d·O·I + Σ g·(O + I), raised while they exceed F(t).

    An augmented Lagrangian: the price felt is max(0, λ + STIFFNESS · excess), so that d and g,
    whose steps the optimiser bounds, are not driven far below the target by what λ has gathered.
    """

    def __init__(self, modules: Sequence[BudgetedLinear], budget: float, steps: int) -> None:
        self.modules, self.budget = list(modules), budget
        self.steps = steps
        self.dense_macs = sum(m.dense_macs for m in self.modules)
        self.price = 0.0
        self.target = 1.0

    def before_step(self, step: int) -> None:
        done = (step + 1) / self.steps
        self.target = 1 + (self.budget - 1) * min(1.0, done)

    def expected_fraction(self) -> Tensor:
        """Expected MACs over dense MACs, differentiable in every d and g."""
        terms = [m.retention * m.dense_macs + m.gate_R.sum() * m.rank_macs for m in self.modules]
        return torch.stack(terms).sum() / self.dense_macs

    def penalty(self) -> Tensor | None:
        excess = self.expected_fraction() - self.target
        return max(0.0, self.price + STIFFNESS * float(excess.detach())) * excess

    @torch.no_grad()
    def after_step(self) -> None:
        for module in self.modules:
            module.clamp_()
        excess = float(self.expected_fraction()) - self.target
        self.price = max(0.0, self.price + DUAL_RATE * excess)

    @torch.no_grad()
    def macs_fraction(self) -> float:
        return float(self.expected_fraction())

    def state(self) -> dict[str, float]:
        return {"price": self.price}

    def load_state(self, state: dict[str, float]) -> None:
        self.price = state["price"]
