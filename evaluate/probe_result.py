"""What the probes measured: hits per query, their means and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class TaskScore:
    """Hits of one task, one entry per query.

    Attributes:
        hit1, hit3: the answer's first token is the most likely one, or among the three.
        chance1: expected HITS@1 of the very same predictions had the answers been handed out to
            the queries at random (the exact mean over all permutations).
        exact: greedy decoding writes the whole answer and then ends the line; None if not asked.
    """

    hit1: tuple[bool, ...]
    hit3: tuple[bool, ...]
    chance1: float
    exact: tuple[bool, ...] | None = None

    @property
    def hits_at_1(self) -> float:
        return sum(self.hit1) / len(self.hit1)

    @property
    def hits_at_3(self) -> float:
        return sum(self.hit3) / len(self.hit3)

    @property
    def exact_match(self) -> float | None:
        return None if self.exact is None else sum(self.exact) / len(self.exact)

    def to_json(self) -> dict[str, Any]:
        """Fractions in [0, 1], ready for a report."""
        return {
            "queries": len(self.hit1),
            "hits_at_1": self.hits_at_1,
            "hits_at_1_interval95": list(bootstrap_interval95([self.hit1])),
            "hits_at_3": self.hits_at_3,
            "chance_hits_at_1": self.chance1,
            "exact_match": self.exact_match,
        }


@dataclass(frozen=True)
class ProbeResult:
    """Scores by task name, with what they depend on.

    `tokens_forwarded` counts the token positions that went through the model, padding included.
    """

    tasks: Mapping[str, TaskScore]
    shots: int
    seed: int
    permuted_labels: bool
    tokens_forwarded: int

    @property
    def mean_hits_at_1(self) -> float:
        """Mean over tasks, each task weighing the same."""
        return float(np.mean([score.hits_at_1 for score in self.tasks.values()]))

    @property
    def mean_hits_at_3(self) -> float:
        """Mean over tasks, each task weighing the same."""
        return float(np.mean([score.hits_at_3 for score in self.tasks.values()]))

    @property
    def mean_chance1(self) -> float:
        """Mean over tasks of HITS@1 under permuted answers."""
        return float(np.mean([score.chance1 for score in self.tasks.values()]))

    @property
    def mean_exact_match(self) -> float | None:
        """Mean over tasks of the full-answer match; None if not asked for."""
        rates = [score.exact_match for score in self.tasks.values()]
        return (
            float(np.mean([rate for rate in rates if rate is not None]))
            if all(rate is not None for rate in rates)
            else None
        )

    @cached_property
    def interval95(self) -> tuple[float, float]:
        """Bootstrap interval of `mean_hits_at_1`."""
        return bootstrap_interval95([score.hit1 for score in self.tasks.values()])

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable fractions, ready for a report."""
        return {
            "shots": self.shots,
            "seed": self.seed,
            "permuted_labels": self.permuted_labels,
            "mean_hits_at_1": self.mean_hits_at_1,
            "mean_hits_at_1_interval95": list(self.interval95),
            "mean_hits_at_3": self.mean_hits_at_3,
            "mean_chance_hits_at_1": self.mean_chance1,
            "mean_exact_match": self.mean_exact_match,
            "tokens_forwarded": self.tokens_forwarded,
            "tasks": {name: score.to_json() for name, score in self.tasks.items()},
        }


def bootstrap_interval95(hits: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean over tasks of each task's hit rate.

    The queries are resampled within each task; tasks and shots are taken as given. Resampling n
    hits of rate p with replacement *is* a binomial draw, so it is made as one. A task without
    misses (or hits) contributes no width.
    """
    generator = np.random.default_rng(seed)
    counts = np.array([len(task) for task in hits])
    rates = np.array([sum(task) / len(task) for task in hits])
    draws = generator.binomial(counts, rates, size=(RESAMPLES, len(counts))) / counts
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
