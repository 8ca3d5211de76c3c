"""The figures of the parity gate, and what each precision may lose.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

TIE = 2e-3
"""Logits of the student closer than this are a tie: float32 itself may order them either way. So
are those that a graph gives as the same number, as half precision does of logits 0.016 apart."""


@dataclass(frozen=True)
class Limits:
    """What a graph of one precision may differ by from the float32 student.

    `max_logit_difference`: largest |difference| of any logit. `top1_agreement`: share of the
    text's positions with the same first choice, ties not counted against it. `cross_entropy`:
    |change| on the text, nats per token. `kl`: mean nats per position of all that was compared so
    far, text and cases: in half precision a single position can differ in torch itself (0.8 nats at
    the second token of a row that begins in mid-sentence, student at F = 0.5), which decides the
    mean of a short case. `route_kl`: mean nats per position of each case between the graph's own
    answers along different routes (cached, padded, in parts), which have the same arithmetic.
    `layer`: relative error of a block's output from which it is said to diverge.
    """

    max_logit_difference: float
    top1_agreement: float
    cross_entropy: float
    kl: float
    route_kl: float
    layer: float


LIMITS = {
    "fp32": Limits(2e-3, 1.0, 1e-4, 1e-6, 1e-6, 1e-3),
    "fp16": Limits(math.inf, 0.995, 0.01, 1e-3, 1e-3, 2e-2),
    "bf16": Limits(math.inf, 0.95, 0.02, 2e-2, 2e-2, 1e-1),
    "int8": Limits(math.inf, 0.80, 0.02, 5e-2, 2e-2, 2e-1),
    "int4": Limits(math.inf, 0.0, 0.2, 0.5, 2e-2, 5e-1),
}


class Tally:
    """Sums over the positions compared so far."""

    def __init__(self) -> None:
        self.positions = self.ties = self.scored = self.values = 0
        self.same: list[bool] = []  # per position: the same first choice, or a tie
        self.max_difference = self.difference = self.kl = 0.0
        self.expected_nll = self.got_nll = 0.0

    def add(self, expected_NV: Tensor, got_NV: Tensor, next_N: Tensor | None = None) -> None:
        """Compare float32 logits; `next_N`: the tokens that followed, for cross-entropy."""
        if not len(expected_NV):
            return
        difference_NV = (expected_NV - got_NV).abs()
        self.positions += len(expected_NV)
        self.values += difference_NV.numel()
        self.max_difference = max(self.max_difference, difference_NV.max().item())
        self.difference += difference_NV.double().sum().item()
        best_N1, own_N1 = (x.argmax(-1, keepdim=True) for x in (expected_NV, got_NV))
        gap_N1 = expected_NV.gather(1, best_N1) - expected_NV.gather(1, own_N1)
        level_N1 = got_NV.gather(1, best_N1) == got_NV.gather(1, own_N1)
        same_N1 = (gap_N1 <= TIE) | level_N1
        self.same += same_N1[:, 0].tolist()
        self.ties += int((same_N1 & (best_N1 != own_N1)).sum())
        log_p_NV, log_q_NV = expected_NV.log_softmax(-1), got_NV.log_softmax(-1)
        self.kl += (log_p_NV.exp() * (log_p_NV - log_q_NV)).double().sum().item()
        if next_N is not None:
            self.scored += len(next_N)
            self.expected_nll -= log_p_NV.gather(1, next_N[:, None]).double().sum().item()
            self.got_nll -= log_q_NV.gather(1, next_N[:, None]).double().sum().item()

    @property
    def mean_kl(self) -> float:
        return max(0.0, self.kl / max(1, self.positions))

    @property
    def agreement(self) -> float:
        return sum(self.same) / max(1, self.positions)

    @property
    def cross_entropy_change(self) -> float:
        return (self.got_nll - self.expected_nll) / max(1, self.scored)


@dataclass(frozen=True)
class CaseFigures:
    """One case against the PyTorch student: logits, mean KL in nats, share of same choices."""

    name: str
    positions: int
    max_logit_difference: float
    kl: float
    top1_agreement: float
    route_kl: float | None


@dataclass(frozen=True)
class ParityReport:
    """What the gate found. Differences are of logits, cross-entropies in nats per token.

    The first figures are those of the text's windows, each one plain prefill; `cases` holds the
    other routes. `ties`: first choices that differ where the student's own logits are closer than
    2e-3 or the graph's are equal, not counted against the agreement. `greedy_matches` of
    `greedy_steps`: cached decode steps, each after the student's own greedy tokens, with the same
    first choice; `greedy_prefix`: steps before the first other choice. `arithmetic`: float32 where
    a bfloat16 graph was run with its weights widened: the provider has no bfloat16 kernels.
    `reference`: what the student computed in, float32, or float64 where float32 was too coarse.
    """

    precision: str
    provider: str
    arithmetic: str
    reference: str
    tokens: int
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    top1_agreement: float
    ties: int
    cross_entropy: float
    cross_entropy_change: float
    perplexity_ratio: float
    greedy_matches: int
    greedy_prefix: int
    greedy_steps: int
    cases: tuple[CaseFigures, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def failure_of(
    tally: Tally, limits: Limits, precision: str, mean_kl: float, route_kl: float | None = None
) -> str | None:
    """The first figure of a case that breaks its limit, in words; ``mean_kl`` is that of all cases
    up to this one."""
    checks = [
        ("largest logit difference", tally.max_difference, limits.max_logit_difference),
        ("mean KL (nats) so far", mean_kl, limits.kl),
    ]
    if route_kl is not None:
        checks.append(("mean KL (nats) to its own plain prefill", route_kl, limits.route_kl))
    if tally.scored:
        change = abs(tally.cross_entropy_change)
        checks.append(("cross-entropy change (nats)", change, limits.cross_entropy))
    for name, value, limit in checks:
        if not value <= limit:
            return f"{name} {value:.3g}, allowed for {precision} is at most {limit:g}"
    if tally.scored and tally.agreement < limits.top1_agreement:
        return (
            f"same first choice at {tally.agreement:.2%} of {tally.positions} positions, allowed "
            f"for {precision} is at least {limits.top1_agreement:.1%}"
        )
    return None
