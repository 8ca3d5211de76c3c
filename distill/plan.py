"""The plan: which part of each module's dense work a student keeps.

One multiple-choice knapsack over all target modules: each is removed (0 MACs), approximated at a
multiple of ``rank_multiple`` (R·(O + I) MACs) or kept (O·I MACs), so that the estimated loss is
least and the MACs add up to at most the budget. The three projections of an MLP may be one choice
instead: how many of its neurons stay, each whole (3·H MACs a neuron; distill/neurons.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from distill.artifact import UserError, read_json, write_json
from distill.lowrank import break_even_rank

Action = Literal["keep", "narrow", "approximate", "remove"]
ACTIONS: tuple[Action, ...] = get_args(Action)
NEURON_WRITERS, NEURON_READER = ("gate_proj", "up_proj"), "down_proj"
MAX_COST_UNITS = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What becomes of one module. ``macs`` and features count per token; features are the dense
    original's. ``rank``: of a narrowed module the neurons that stay, outputs of a gate_proj or
    up_proj and inputs of a down_proj."""

    module: str
    action: Action
    rank: int
    macs: int
    out_features: int
    in_features: int
    reason: str

    @property
    def dense_macs(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Plan:
    """All decisions of one student, in model order."""

    budget: float
    method: str
    allocation: str
    rank_multiple: int
    decisions: tuple[Decision, ...]

    @property
    def macs(self) -> int:
        return sum(d.macs for d in self.decisions)

    @property
    def dense_macs(self) -> int:
        return sum(d.dense_macs for d in self.decisions)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module that is approximated; 0 where it is removed."""
        return {d.module: d.rank for d in self.decisions if d.action in ("approximate", "remove")}

    @property
    def widths(self) -> dict[str, int]:
        """Neurons of every MLP that is narrowed, by its name."""
        narrowed = (d for d in self.decisions if d.action == "narrow")
        return {d.module.rpartition(".")[0]: d.rank for d in narrowed}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dense_macs": self.dense_macs, "macs": self.macs}

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Plan:
        """Read plan.json; raises UserError when it is missing, truncated or not a plan."""
        raw = read_json(path)
        try:
            decisions = tuple(Decision(**d) for d in raw["decisions"])
            keys = ("budget", "method", "allocation", "rank_multiple")
            return Plan(**{key: raw[key] for key in keys}, decisions=decisions)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a plan ({error}); write it again with --plan-only, or a student's "
                "with a new run"
            ) from None


@dataclass(frozen=True)
class Option:
    """What may become of one unit, a decision a module; ``loss``: estimated, nats per token."""

    decisions: tuple[Decision, ...]
    loss: float

    @property
    def macs(self) -> int:
        return sum(d.macs for d in self.decisions)


@dataclass(frozen=True)
class Module:
    """A target module's shape and the loss each of its rank-one terms is worth (descending)."""

    name: str
    out_features: int
    in_features: int
    energy_K: np.ndarray

    @property
    def dense_macs(self) -> int:
        return self.out_features * self.in_features

    @property
    def highest_rank(self) -> int:
        """The largest rank that is worth while."""
        return break_even_rank(self.out_features, self.in_features)

    def options(self, rank_multiple: int) -> list[Option]:
        """Remove, every useful rank, and keep, by rising cost."""
        ranks = range(rank_multiple, self.highest_rank + 1, rank_multiple)
        cost = self.out_features + self.in_features
        return [
            self._option("remove", 0, 0),
            *(self._option("approximate", r, r * cost) for r in ranks),
            Option((self.kept,), 0.0),
        ]

    @property
    def kept(self) -> Decision:
        """Leave the module as it is."""
        rank = min(self.out_features, self.in_features)
        return self.decision("keep", rank, self.dense_macs, 0.0)

    def _option(self, action: Action, rank: int, macs: int) -> Option:
        loss = self.lost(rank)
        return Option((self.decision(action, rank, macs, loss),), loss)

    def decision(self, action: Action, rank: int, macs: int, loss: float) -> Decision:
        reason = f"estimated loss {loss:.2e} nats"
        return Decision(self.name, action, rank, macs, self.out_features, self.in_features, reason)

    def lost(self, rank: int) -> float:
        """Estimated loss (nats per token) of stopping at ``rank``: half the tail's energy."""
        return 0.5 * float(self.energy_K[rank:].sum())


@dataclass(frozen=True)
class Mlp:
    """The projections of one MLP, and the loss each of its neurons is worth (the last to go first).

    Half of ``energy_M[k:].sum()`` is the loss of keeping the first k neurons.
    """

    modules: tuple[Module, ...]
    energy_M: np.ndarray

    @property
    def dense_macs(self) -> int:
        return sum(m.dense_macs for m in self.modules)

    @property
    def highest_rank(self) -> int:
        """The most neurons that are fewer than all."""
        return len(self.energy_M) - 1

    def options(self, rank_multiple: int) -> list[Option]:
        """Remove, every number of neurons that is a multiple, and keep, by rising cost."""
        widths = range(rank_multiple, self.highest_rank + 1, rank_multiple)
        return [
            self._option("remove", 0),
            *(self._option("narrow", width) for width in widths),
            Option(tuple(m.kept for m in self.modules), 0.0),
        ]

    def _option(self, action: Action, width: int) -> Option:
        loss = 0.5 * float(self.energy_M[width:].sum())
        share = len(self.energy_M)
        decisions = (
            m.decision(action, width, m.dense_macs // share * width, loss) for m in self.modules
        )
        return Option(tuple(decisions), loss)


Unit = Module | Mlp


def units_of(modules: Sequence[Module], neurons: Mapping[str, np.ndarray]) -> list[Unit]:
    """The modules in their order, those of an MLP that ``neurons`` has energies of as one unit."""
    units: list[Unit] = []
    members: dict[str, list[Module]] = {}
    for module in modules:
        block = module.name.rpartition(".")[0]
        if block not in neurons:
            units.append(module)
            continue
        members.setdefault(block, []).append(module)
        if len(members[block]) == len((*NEURON_WRITERS, NEURON_READER)):
            units.append(Mlp(tuple(members[block]), neurons[block]))
    return units


def spectral_decisions(
    units: Sequence[Unit], budget: float, rank_multiple: int
) -> tuple[Decision, ...]:
    """The knapsack's answer: least estimated loss with total MACs ≤ budget × dense MACs."""
    options = [unit.options(rank_multiple) for unit in units]
    losses = [np.array([option.loss for option in row]) for row in options]
    costs = [[option.macs for option in row] for row in options]
    chosen = knapsack(costs, losses, allowed_macs(units, budget))
    return _together(row[c] for row, c in zip(options, chosen, strict=True))


def uniform_decisions(
    units: Sequence[Unit], budget: float, rank_multiple: int
) -> tuple[Decision, ...]:
    """The classical competitor: every module spends the same fraction of its own MACs.

    Ranks are rounded down; what rounding leaves over goes to the modules that lost most by it.
    """
    allowed = allowed_macs(units, budget)
    if budget >= 1:
        return _together(unit.options(rank_multiple)[-1] for unit in units)
    ladders = [unit.options(rank_multiple)[:-1] for unit in units]
    wanted = [budget * unit.dense_macs for unit in units]
    level = [
        max(k for k, d in enumerate(r) if d.macs <= w) for r, w in zip(ladders, wanted, strict=True)
    ]
    spent = sum(r[k].macs for r, k in zip(ladders, level, strict=True))
    short = sorted(range(len(units)), key=lambda j: ladders[j][level[j]].macs / wanted[j])
    for j in short:
        if level[j] + 1 < len(ladders[j]):
            extra = ladders[j][level[j] + 1].macs - ladders[j][level[j]].macs
            if spent + extra <= allowed:
                level[j] += 1
                spent += extra
    return _together(r[k] for r, k in zip(ladders, level, strict=True))


def _together(options: Iterable[Option]) -> tuple[Decision, ...]:
    return tuple(decision for option in options for decision in option.decisions)


def keep_decisions(modules: Sequence[Module]) -> tuple[Decision, ...]:
    """Keep everywhere: the plan of a merged LoRA baseline and of F = 1."""
    return tuple(module.kept for module in modules)


def allowed_macs(units: Sequence[Unit], budget: float) -> int:
    return math.floor(budget * sum(unit.dense_macs for unit in units) + 1e-6)


def knapsack(
    costs: Sequence[Sequence[int]], losses: Sequence[np.ndarray], allowed: int
) -> list[int]:
    """Exact multiple-choice knapsack by dynamic programming over cost units.

    ``costs[j][k]`` and ``losses[j][k]`` belong to option k of item j; the first option of each
    item must be free. Costs are counted in their greatest common divisor, or, where that makes
    more than 65536 states, rounded up to a coarser unit (never above ``allowed``). Returns the
    chosen option of every item.
    """
    divisor = math.gcd(*(c for row in costs for c in row)) or 1
    unit = max(divisor, -(-allowed // MAX_COST_UNITS))
    states = allowed // unit + 1
    best = np.zeros(states)
    choice = np.zeros((len(costs), states), dtype=np.int16)
    for j, (row, loss) in enumerate(zip(costs, losses, strict=True)):
        nxt = np.full(states, np.inf)
        for k, cost in enumerate(row):
            need = -(-cost // unit)
            if need >= states:
                continue
            candidate = best[: states - need] + loss[k]
            better = candidate < nxt[need:]
            nxt[need:][better] = candidate[better]
            choice[j, need:][better] = k
        best = nxt
    chosen, left = [], states - 1
    for j in range(len(costs) - 1, -1, -1):
        k = int(choice[j, left])
        chosen.append(k)
        left -= -(-costs[j][k] // unit)
    return chosen[::-1]


def check_rank_multiple(units: Sequence[Unit], rank_multiple: int) -> None:
    """Raise UserError when nothing could be approximated or narrowed at ``rank_multiple``."""
    largest = max(unit.highest_rank for unit in units)
    if rank_multiple > largest:
        raise UserError(
            f"--rank-multiple {rank_multiple}: no target module of this model gains from that rank "
            f"or number of neurons (the largest useful one is {largest}); "
            f"use 8, 16, 32 or 64 up to {largest}"
        )


def modules_of(linears: Mapping[str, Any]) -> list[Module]:
    """Target modules without spectra, where shapes are enough."""
    return [Module(n, m.out_features, m.in_features, np.zeros(0)) for n, m in linears.items()]
