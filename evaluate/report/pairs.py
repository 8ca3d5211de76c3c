"""Budgeted students against the baselines, on the very same windows and queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evaluate.bootstrap import interval95, resampled_sums
from evaluate.contenders import Contender
from evaluate.perplexity import perplexity_ratio
from evaluate.probe_result import ProbeResult
from evaluate.quality import Quality


def paired_comparisons(
    contenders: Sequence[Contender], quality: Mapping[str, Quality]
) -> list[dict[str, Any]]:
    """Each budgeted student in PyTorch against SVD of the same budget, and standard LoRA."""
    return [
        {
            "student": student.id,
            "baseline": baseline.id,
            **perplexity_ratio(quality[student.id].windows, quality[baseline.id].windows),
            **compare_probes(
                quality[student.id].probes.headline, quality[baseline.id].probes.headline
            ),
        }
        for student, baseline in _pairs([c for c in contenders if c.id in quality])
    ]


def compare_probes(a: ProbeResult, b: ProbeResult) -> dict[str, Any]:
    """Mean HITS@1 of `a` − that of `b` with its paired 95 % interval over queries."""
    samples = []
    for place, (name, score) in enumerate(a.tasks.items()):
        mine, its = resampled_sums([np.array(score.hit1), np.array(b.tasks[name].hit1)], place)
        samples.append((mine - its) / len(score.hit1))
    interval = interval95(np.mean(samples, axis=0))
    return {
        "hits_at_1_difference": a.mean_hits_at_1 - b.mean_hits_at_1,
        "hits_at_1_difference_interval95": None if interval is None else list(interval),
    }


def _pairs(contenders: Sequence[Contender]) -> Iterator[tuple[Contender, Contender]]:
    plain = [c for c in contenders if c.engine == "pytorch"]
    for student in (c for c in plain if c.group == "budgeted"):
        for other in plain:
            same_budget = abs(other.macs_fraction - student.macs_fraction) < 0.02
            if other.group == "lora" or (other.group == "svd" and same_budget):
                yield student, other
