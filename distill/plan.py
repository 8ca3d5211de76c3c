"""The plan: which part of each module's dense work a student keeps.

One multiple-choice knapsack over all target modules: each is removed (0 MACs), approximated at a
multiple of ``rank_multiple`` (R·(O + I) MACs) or kept (O·I MACs), so that the estimated loss is
least and the MACs add up to at most the budget.

In an interpolative plan an approximated projection of an MLP costs R·(O + I − R): of R of its
neurons, its *skeleton*, the rank's own matrix computes the very values, so that only the others
need the second one (interpolative decomposition, Cheng et al. 2005; distill/interpolate.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.artifact import UserError, read_json, write_json
from distill.lowrank import break_even_rank

Action = Literal["keep", "approximate", "remove"]
NEURON_WRITERS, NEURON_READER = ("gate_proj", "up_proj"), "down_proj"
MAX_COST_UNITS = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What becomes of one module. ``macs`` and features count per token.

    ``skeleton``: the first neuron of the ``rank`` that are the skeleton of an interpolative module,
    among the outputs of a gate_proj or up_proj and among the inputs of a down_proj; None: a pair.
    """

    module: str
    action: Action
    rank: int
    macs: int
    out_features: int
    in_features: int
    reason: str
    skeleton: int | None = None

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
        """Rank of every module that is not kept; 0 where it is removed."""
        return {d.module: d.rank for d in self.decisions if d.action != "keep"}

    @property
    def skeletons(self) -> dict[str, int]:
        """First neuron of every skeleton, by module."""
        return {d.module: d.skeleton for d in self.decisions if d.skeleton is not None}

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
                f"{path}: not a plan ({error}); write it again with --plan-only"
            ) from None


@dataclass(frozen=True)
class Module:
    """A target module's shape and the loss each of its rank-one terms is worth (descending)."""

    name: str
    out_features: int
    in_features: int
    energy_K: np.ndarray
    interpolative: bool = False

    @property
    def dense_macs(self) -> int:
        return self.out_features * self.in_features

    @property
    def highest_rank(self) -> int:
        """The largest rank that is worth while; three skeletons of an MLP share no neuron."""
        if self.interpolative:
            return highest_skeleton(self.name, self.out_features, self.in_features)
        return break_even_rank(self.out_features, self.in_features)

    def cost(self, rank: int) -> int:
        """MACs of ``rank``."""
        both = self.out_features + self.in_features
        return rank * (both - rank if self.interpolative else both)

    def options(self, rank_multiple: int) -> list[Decision]:
        """Remove, every useful rank, and keep, by rising cost."""
        ranks = range(rank_multiple, self.highest_rank + 1, rank_multiple)
        return [
            self.decision("remove", 0, 0),
            *(self.decision("approximate", r, self.cost(r)) for r in ranks),
            self.decision("keep", min(self.out_features, self.in_features), self.dense_macs),
        ]

    def decision(self, action: Action, rank: int, macs: int) -> Decision:
        loss = 0.0 if action == "keep" else self.lost(rank)
        reason = f"estimated loss {loss:.2e} nats"
        skeleton = 0 if self.interpolative and action == "approximate" else None
        return Decision(
            self.name, action, rank, macs, self.out_features, self.in_features, reason, skeleton
        )

    def lost(self, rank: int) -> float:
        """Estimated loss (nats per token) of stopping at ``rank``: half the tail's energy."""
        return 0.5 * float(self.energy_K[rank:].sum())


def spectral_decisions(
    modules: Sequence[Module], budget: float, rank_multiple: int
) -> tuple[Decision, ...]:
    """The knapsack's answer: least estimated loss with total MACs ≤ budget × dense MACs."""
    options = [m.options(rank_multiple) for m in modules]
    allowed = allowed_macs(modules, budget)
    losses = [
        np.array([0.0 if d.action == "keep" else m.lost(d.rank) for d in row])
        for m, row in zip(modules, options, strict=True)
    ]
    chosen = knapsack([[d.macs for d in row] for row in options], losses, allowed)
    return _placed([row[c] for row, c in zip(options, chosen, strict=True)])


def uniform_decisions(
    modules: Sequence[Module], budget: float, rank_multiple: int
) -> tuple[Decision, ...]:
    """The classical competitor: every module spends the same fraction of its own MACs.

    Ranks are rounded down; what rounding leaves over goes to the modules that lost most by it.
    """
    allowed = allowed_macs(modules, budget)
    if budget >= 1:
        return tuple(m.options(rank_multiple)[-1] for m in modules)
    ladders = [m.options(rank_multiple)[:-1] for m in modules]
    wanted = [budget * m.dense_macs for m in modules]
    level = [
        max(k for k, d in enumerate(r) if d.macs <= w) for r, w in zip(ladders, wanted, strict=True)
    ]
    spent = sum(r[k].macs for r, k in zip(ladders, level, strict=True))
    short = sorted(range(len(modules)), key=lambda j: ladders[j][level[j]].macs / wanted[j])
    for j in short:
        if level[j] + 1 < len(ladders[j]):
            extra = ladders[j][level[j] + 1].macs - ladders[j][level[j]].macs
            if spent + extra <= allowed:
                level[j] += 1
                spent += extra
    return _placed([r[k] for r, k in zip(ladders, level, strict=True)])


def is_neural(name: str) -> bool:
    """Whether the module is a projection of an MLP, whose neurons may stand in any order."""
    return name.rpartition(".")[2] in (*NEURON_WRITERS, NEURON_READER)


def interpolative_names(linears: Mapping[str, Any]) -> set[str]:
    """The projections of all MLPs that have no bias."""
    biased = {
        name.rpartition(".")[0] for name, linear in linears.items() if linear.bias is not None
    }
    return {n for n in linears if is_neural(n) and n.rpartition(".")[0] not in biased}


def highest_skeleton(name: str, out_features: int, in_features: int) -> int:
    """The largest interpolative rank of a projection of an MLP; 0 for any other module."""
    if not is_neural(name):
        return 0
    neurons = in_features if name.endswith(NEURON_READER) else out_features
    return min(neurons // 3, out_features - 1, in_features - 1)


def _placed(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """Every skeleton at its place: down_proj's first, then gate_proj's, and up_proj's at the end,
    so that each is contiguous and no two share a neuron."""
    ranks = {d.module: d.rank for d in decisions if d.skeleton is not None}
    placed = []
    for d in decisions:
        block, _, kind = d.module.rpartition(".")
        if d.skeleton is not None and kind == "gate_proj":
            d = replace(d, skeleton=ranks.get(f"{block}.{NEURON_READER}", 0))
        elif d.skeleton is not None and kind == "up_proj":
            d = replace(d, skeleton=d.out_features - d.rank)
        placed.append(d)
    return tuple(placed)


def keep_decisions(modules: Sequence[Module]) -> tuple[Decision, ...]:
    """Keep everywhere: the plan of a merged LoRA baseline and of F = 1."""
    return tuple(m.options(max(m.out_features, m.in_features))[-1] for m in modules)


def allowed_macs(modules: Sequence[Module], budget: float) -> int:
    return math.floor(budget * sum(m.dense_macs for m in modules) + 1e-6)


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


def check_rank_multiple(modules: Sequence[Module], rank_multiple: int) -> None:
    """Raise UserError when no module could be approximated at ``rank_multiple``."""
    largest = max(m.highest_rank for m in modules)
    if rank_multiple > largest:
        raise UserError(
            f"--rank-multiple {rank_multiple}: no target module of this model gains from that rank "
            f"(the largest useful one is {largest}); use 8, 16, 32 or 64 up to {largest}"
        )


def modules_of(
    linears: Mapping[str, Any], interpolative: Collection[str] = frozenset()
) -> list[Module]:
    """Target modules without spectra, for plans that keep everything."""
    return [
        Module(n, m.out_features, m.in_features, np.zeros(0), n in interpolative)
        for n, m in linears.items()
    ]
