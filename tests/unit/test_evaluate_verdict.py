"""The verdict follows from the numbers; retention and comparisons from the queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evaluate.bootstrap import interval95, resampled_sums
from evaluate.perplexity import WindowScores, perplexity_ratio
from evaluate.probe_result import ProbeResult, TaskScore
from evaluate.probe_suite import retention
from evaluate.report.pairs import compare_probes
from evaluate.report.verdict import verdicts


def entry(
    run: str,
    group: str,
    engine: str,
    precision: str,
    perplexity: float,
    accuracy: float,
    speed: float | None,
    ratio_interval: tuple[float, float] | None = (1.5, 1.7),
    prefill: float = 1000.0,
    difference_interval: tuple[float, float] = (-0.02, 0.02),
) -> dict[str, Any]:
    """A contender of a report with what the verdict reads."""
    latency = [
        {"kind": "decode", "batch": 1, "prompt_tokens": 32, "tokens_per_s": speed},
        {"kind": "decode", "batch": 1, "prompt_tokens": 256, "tokens_per_s": 1e9},
        {"kind": "prefill", "batch": 1, "prompt_tokens": 32, "tokens_per_s": 1e9},
        {"kind": "prefill", "batch": 1, "prompt_tokens": 256, "tokens_per_s": prefill},
    ]
    return {
        "id": f"{run}/{engine}-{precision}",
        "label": f"{run} {engine} {precision}",
        "run": run,
        "group": group,
        "engine": engine,
        "macs_fraction": 0.25,
        "budget": 0.25,
        "model_bytes": 1000,
        "perplexity": {
            "perplexity": perplexity,
            "ratio_to_dense": perplexity / 30,
            "ratio_to_dense_interval95": ratio_interval,
        },
        "probes": {
            "headline_shots": 10,
            "by_shots": {"10": {"mean_hits_at_1": accuracy}},
            "retention": {
                "retention": accuracy / 0.5,
                "difference_interval95": difference_interval,
                "worst_task": "antonym",
                "tasks": {"antonym": {"retention": 0.25}},
            },
        },
        "latency": None if speed is None else latency,
    }


def report(*contenders: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"contenders": list(contenders), "comparisons": [], "modules": None, **more}


DENSE = entry("dense", "dense", "ort", "fp32", 30, 0.5, 50)
DENSE_INT4 = entry("dense", "dense", "ort", "int4", 33, 0.48, 140)


def test_a_student_that_dense_int4_beats_in_everything_is_not_worth_it() -> None:
    student = entry("b25", "budgeted", "ort", "fp32", 50, 0.3, 120)
    (verdict,) = verdicts(report(DENSE, DENSE_INT4, student))
    assert verdict["kind"] == "not worth it" and verdict["about"] == "b25"
    for part in ("NOT worth it", "140 tokens/s", "120", "33.0", "50.0", "60%", "25%", "antonym"):
        assert part in verdict["text"], part


def test_the_same_student_in_int4_is_a_trade() -> None:
    student = entry("b25", "budgeted", "ort", "fp32", 50, 0.3, 120)
    small = entry("b25", "budgeted", "ort", "int4", 55, 0.28, 210)
    (verdict,) = verdicts(report(DENSE, DENSE_INT4, student, small))
    assert verdict["kind"] == "a trade"
    assert "210 tokens/s, 1.50 times the fastest dense" in verdict["text"]
    assert "lost more than half" not in verdict["text"]
    poor = entry("b25", "budgeted", "ort", "int4", 90, 0.1, 210)
    (verdict,) = verdicts(report(DENSE, DENSE_INT4, poor))
    assert verdict["kind"] == "a trade" and "lost more than half" in verdict["text"]


def test_faster_and_not_to_be_told_apart_is_worth_it() -> None:
    student = entry("b75", "budgeted", "ort", "int4", 30.2, 0.5, 200, (0.99, 1.03))
    assert verdicts(report(DENSE, DENSE_INT4, student))[0]["kind"] == "worth it"


@pytest.mark.parametrize("but", ["slower", "worse answers", "worse perplexity"])
def test_as_good_in_one_thing_alone_is_not_yet_worth_it(but: str) -> None:
    speed = 60 if but == "slower" else 200
    ratio = (1.01, 1.03) if but == "worse perplexity" else (0.99, 1.03)
    difference = (-0.2, -0.1) if but == "worse answers" else (-0.1, 0.02)
    student = entry(
        "b75", "budgeted", "ort", "int4", 30.2, 0.5, speed, ratio, difference_interval=difference
    )
    assert verdicts(report(DENSE, DENSE_INT4, student))[0]["kind"] == "a trade"


def test_a_student_that_reads_prompts_faster_is_a_trade_though_it_decodes_slower() -> None:
    student = entry("b25", "budgeted", "ort", "fp32", 50, 0.3, 120, prefill=3000)
    (verdict,) = verdicts(report(DENSE, DENSE_INT4, student))
    assert verdict["kind"] == "a trade" and "reads prompts 3.00 times as fast" in verdict["text"]


def test_a_student_without_engines_is_not_held_against_dense_engines() -> None:
    student = entry("b25", "budgeted", "pytorch", "fp32", 50, 0.3, 30)
    assert verdicts(report(DENSE_INT4, student))[0]["kind"] == "unknown"
    torch_dense = entry("teacher", "dense", "pytorch", "fp32", 30, 0.5, 20)
    assert verdicts(report(DENSE_INT4, torch_dense, student))[0]["kind"] == "a trade"


def test_a_student_whose_time_failed_gets_no_verdict_on_speed() -> None:
    student = entry("b25", "budgeted", "ort", "fp32", 50, 0.3, None)
    assert verdicts(report(DENSE, student))[0]["kind"] == "unknown"


@pytest.mark.parametrize(
    ("ratio", "difference", "kind"),
    [
        ((0.8, 0.9), (0.01, 0.05), "better"),
        ((0.8, 0.9), (-0.01, 0.05), "better"),
        ((1.1, 1.2), (-0.05, -0.01), "worse"),
        ((0.8, 0.9), (-0.05, -0.01), "mixed"),
        ((0.9, 1.1), (-0.05, 0.01), "no difference shown"),
        (None, None, "no difference shown"),
    ],
)
def test_a_baseline_is_beaten_only_where_the_interval_says_so(
    ratio: Any, difference: Any, kind: str
) -> None:
    student = entry("b25", "budgeted", "pytorch", "fp32", 50, 0.3, None)
    other = entry("svd", "svd", "pytorch", "fp32", 60, 0.2, None)
    pair = {
        "student": student["id"],
        "baseline": other["id"],
        "perplexity_ratio": 0.83,
        "perplexity_ratio_interval95": ratio,
        "hits_at_1_difference": 0.1,
        "hits_at_1_difference_interval95": difference,
    }
    assert verdicts(report(student, other, comparisons=[pair]))[-1]["kind"] == kind


def score(hits: list[bool], chance: float = 0.05) -> TaskScore:
    return TaskScore(tuple(hits), tuple(hits), chance)


def result(**tasks: list[bool]) -> ProbeResult:
    return ProbeResult({n: score(h) for n, h in tasks.items()}, 10, 0, False, 100)


def test_retention_is_paired_and_says_which_task_suffered_most() -> None:
    dense = result(a=[True] * 40 + [False] * 20, b=[True] * 50 + [False] * 10, c=[False] * 60)
    student = result(a=[True] * 20 + [False] * 40, b=[True] * 50 + [False] * 10, c=[False] * 60)
    found = retention(student, dense)
    assert found["retention"] == pytest.approx((20 + 50) / (40 + 50))
    assert found["tasks"]["a"]["retention"] == 0.5 and found["worst_task"] == "a"
    assert found["tasks"]["c"]["retention"] is None
    low, high = found["tasks"]["a"]["retention_interval95"]
    assert low < 0.5 < high
    assert found["tasks"]["b"]["retention_interval95"] == [1, 1], "the same hits: no doubt at all"


def test_paired_intervals_are_those_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(60) < 0.6
    flipped = base.copy()
    flipped[:6] = ~flipped[:6]
    found = compare_probes(result(a=list(flipped)), result(a=list(base)))
    differences = flipped.astype(float) - base
    spread = 1.96 * differences.std() / np.sqrt(60)
    low, high = found["hits_at_1_difference_interval95"]
    assert found["hits_at_1_difference"] == pytest.approx(differences.mean())
    assert (high - low) / 2 == pytest.approx(spread, rel=0.15)


def windows(nll: np.ndarray) -> WindowScores:
    tokens = np.full(len(nll), 100.0)
    return WindowScores(nll * 100, nll * 0, nll * 0, tokens, tokens * 4)


def test_a_perplexity_ratio_is_far_surer_than_the_perplexities() -> None:
    nll = np.random.default_rng(0).normal(3.5, 0.5, 16)
    a, b = windows(nll + 0.2), windows(nll)
    low, high = a.to_json()["perplexity_interval95"]
    found = perplexity_ratio(a, b)
    assert found["perplexity_ratio"] == pytest.approx(np.exp(0.2))
    narrow = found["perplexity_ratio_interval95"]
    assert narrow == pytest.approx([np.exp(0.2)] * 2) and high / low > 1.3
    one = windows(nll[:1]).to_json()
    assert one["perplexity_interval95"] is None, "one window says nothing of its spread"


def test_resampling_equals_the_known_error_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(10, 2, 50)
    (sums,) = resampled_sums([values])
    low, high = interval95(sums / 50) or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(50), rel=0.1)
    assert interval95(np.array([1.0, np.nan])) is None
