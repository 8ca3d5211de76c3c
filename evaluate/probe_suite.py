"""The probes of one contender: several numbers of shots, the permuted control, and retention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluate.bootstrap import interval95, ratio, ratio_interval95, resampled_sums
from evaluate.probe_result import ProbeResult, TaskScore
from evaluate.probe_tasks import Pair
from evaluate.probes import score_tasks
from evaluate.runners import Runner


@dataclass(frozen=True)
class ProbeSettings:
    """What is asked; the last and largest of `shots` is the headline."""

    shots: tuple[int, ...] = (0, 1, 5, 10)
    queries_per_task: int = 60
    prefixes: int = 2
    seed: int = 0
    batch_size: int = 32

    @property
    def headline(self) -> int:
        return self.shots[-1]


@dataclass(frozen=True)
class SuiteResult:
    """Results by number of shots; `control` has the shots' labels permuted, at most shots."""

    by_shots: Mapping[int, ProbeResult]
    control: ProbeResult | None

    @property
    def headline(self) -> ProbeResult:
        return self.by_shots[max(self.by_shots)]

    def to_json(self) -> dict[str, Any]:
        return {
            "headline_shots": max(self.by_shots),
            "by_shots": {str(shots): r.to_json() for shots, r in self.by_shots.items()},
            "control": None if self.control is None else self.control.to_json(),
        }


def run_suite(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Pair]],
    settings: ProbeSettings,
    *,
    full: bool,
    on_task: Callable[[str, TaskScore], None] | None = None,
) -> SuiteResult:
    """Score the headline with exact match; with `full`, the other shots and the control too.

    Every contender is asked the same questions behind the same shots (fixed seed).
    """

    def score(shots: int, permute_labels: bool = False) -> ProbeResult:
        return score_tasks(
            runner,
            tokenizer,
            tasks,
            shots=shots,
            queries_per_task=settings.queries_per_task,
            prefixes=settings.prefixes,
            seed=settings.seed,
            batch_size=settings.batch_size,
            exact_match=shots == settings.headline and not permute_labels,
            permute_labels=permute_labels,
            on_task=on_task,
        )

    asked = settings.shots if full else settings.shots[-1:]
    results = {shots: score(shots) for shots in asked}
    control = full and settings.headline > 1  # a single label cannot be handed round
    return SuiteResult(results, score(settings.headline, True) if control else None)


def retention(contender: ProbeResult, dense: ProbeResult) -> dict[str, Any]:
    """Accuracy ÷ the dense original's on the very same queries, overall and per task.

    `worst_task` is the task with the least retention among those where the dense original is above
    chance. Intervals resample the queries of each task, jointly for both.
    """
    tasks: dict[str, Any] = {}
    mine_samples, its_samples = [], []
    for place, (name, score) in enumerate(contender.tasks.items()):
        other = dense.tasks[name]
        mine, its = (
            column / len(score.hit1)
            for column in resampled_sums([np.array(score.hit1), np.array(other.hit1)], place)
        )
        mine_samples.append(mine)
        its_samples.append(its)
        tasks[name] = {
            "retention": ratio(score.hits_at_1, other.hits_at_1),
            "retention_interval95": _listed(ratio_interval95(mine, its)),
            "difference": score.hits_at_1 - other.hits_at_1,
            "difference_interval95": _listed(interval95(mine - its)),
            "dense_above_chance": other.hits_at_1 > other.chance1,
        }
    mine_mean, its_mean = np.mean(mine_samples, axis=0), np.mean(its_samples, axis=0)
    usable = {n: t for n, t in tasks.items() if t["dense_above_chance"]}
    return {
        "retention": ratio(contender.mean_hits_at_1, dense.mean_hits_at_1),
        "retention_interval95": _listed(ratio_interval95(mine_mean, its_mean)),
        "difference": contender.mean_hits_at_1 - dense.mean_hits_at_1,
        "difference_interval95": _listed(interval95(mine_mean - its_mean)),
        "worst_task": min(usable, key=lambda n: usable[n]["retention"] or 0.0, default=None),
        "tasks": tasks,
    }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
