"""When a sweep will end: work still to do, at the speed of the work of the same kind done so far.

A training is its tokens at a speed, plus what every run needs besides (loading, the refit,
held-out text). The first training also makes what all share (statistics and the teacher's outputs),
so its overhead is counted in part until a second one is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Seconds a unit of work on two cores without a GPU, SmolLM2-135M. Only a first guess: a kind that
# was timed goes on at its own speed, the others are scaled alike.
FIRST_GUESS_S = {"train": 2.4e-3, "export": 21.0, "evaluate": 58.0}
FIRST_OVERHEAD_S = 30.0
FIRST_SHARED_S = 90.0
OWN_SHARE_OF_FIRST_OVERHEAD = 0.25


@dataclass(frozen=True)
class Step:
    """One command of a sweep. ``work`` is in units of its kind: for training, tokens weighted by
    what one costs at this budget; for export, precisions; for evaluation, contenders."""

    name: str
    kind: str
    work: float


@dataclass(frozen=True)
class Took:
    """Seconds of a finished step; ``work_s`` of them went into its work, the rest is overhead."""

    seconds: float
    work_s: float

    @property
    def overhead_s(self) -> float:
        return max(self.seconds - self.work_s, 0.0)


def training_work(tokens: int, budget: float, method: str) -> float:
    """Tokens × cost relative to LoRA on the dense model, from the FLOPs of forward and backward.

    The head and attention cost the same at every budget; kept and narrowed modules are frozen and
    skip their weight gradients, factored ones do not. Nothing is trained at F = 1.
    """
    if method == "lora":
        return float(tokens)
    if method == "svd":
        return tokens * (0.33 + 0.94 * budget)
    return 0.0 if budget >= 1 else tokens * (0.34 + 0.68 * budget)


def seconds_left(steps: Sequence[Step], took: Mapping[str, Took]) -> float:
    """Seconds for the steps that `took`, which maps finished ones to their times, does not have."""
    speeds = {kind: _speed([s for s in steps if s.kind == kind], took) for kind in FIRST_GUESS_S}
    measured = [kind for kind, speed in speeds.items() if speed is not None]
    ratios = [(speeds[kind] or 0.0) / FIRST_GUESS_S[kind] for kind in measured]
    pace = sum(ratios) / len(ratios) if ratios else 1.0
    left = [step for step in steps if step.name not in took]
    work_s = sum(
        step.work * (speeds[step.kind] or pace * FIRST_GUESS_S[step.kind]) for step in left
    )
    return work_s + _overheads(steps, left, took, pace)


def _speed(steps: Sequence[Step], took: Mapping[str, Took]) -> float | None:
    """Seconds a unit of work, over all steps of one kind that were carried out."""
    done = [
        (s.work, took[s.name].work_s)
        for s in steps
        if s.name in took and took[s.name].seconds > 0 and s.work > 0
    ]
    seconds, work = sum(s for _, s in done), sum(w for w, _ in done)
    return seconds / work if seconds > 0 and work > 0 else None


def _overheads(
    steps: Sequence[Step], left: Sequence[Step], took: Mapping[str, Took], pace: float
) -> float:
    """What the trainings that are left need beside training."""
    trained = [s for s in steps if s.kind == "train" and s.work > 0]
    done = [took[s.name].overhead_s for s in trained if s.name in took and took[s.name].seconds]
    waiting = sum(step in left for step in trained)
    if not done:
        return pace * (waiting * FIRST_OVERHEAD_S + FIRST_SHARED_S * bool(waiting))
    each = min(done) if len(done) > 1 else OWN_SHARE_OF_FIRST_OVERHEAD * done[0]
    return waiting * each
