"""Perplexity and probes of one contender, kept on disk so that a killed comparison goes on.

What was measured is found again only for the same weights, text, tasks, settings and libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.artifact import library_versions, read_json, sha256_file, write_json
from evaluate.contenders import Contender
from evaluate.perplexity import TeacherReference, Window, WindowScores, score_windows
from evaluate.probe_result import ProbeResult, TaskScore
from evaluate.probe_suite import ProbeSettings, SuiteResult, run_suite
from evaluate.probe_tasks import Pair
from evaluate.runners import Runner

SCORING_VERSION = 1


@dataclass(frozen=True)
class Questions:
    """Everything that every contender is asked."""

    tokenizer: PreTrainedTokenizerBase
    windows: Sequence[Window]
    text_sha256: str
    tasks: Mapping[str, Sequence[Pair]]
    probes: ProbeSettings
    teacher_fingerprint: str


@dataclass(frozen=True)
class Quality:
    """Scores of one contender."""

    windows: WindowScores
    probes: SuiteResult


def measure_quality(
    runner: Callable[[], Runner],
    contender: Contender,
    questions: Questions,
    reference: Callable[[], TeacherReference],
    cache: Path,
    *,
    full: bool,
    advance: Callable[[int], None] = lambda parts: None,
) -> Quality:
    """Score the contender, or find its scores in `cache`; the runner is opened only when needed.

    `full` asks for every number of shots and the permuted control. `advance` counts windows and
    task passes.
    """
    path = cache / f"quality-{_key(contender, questions, full)}.json"
    if path.is_file():
        advance(parts_of(questions, full=full))
        return _read(path)
    opened = runner()
    scores = score_windows(opened, questions.windows, reference(), lambda _: advance(1))
    suite = run_suite(
        opened,
        questions.tokenizer,
        questions.tasks,
        questions.probes,
        full=full,
        on_task=lambda name, score: advance(1),
    )
    quality = Quality(scores, suite)
    cache.mkdir(parents=True, exist_ok=True)
    write_json(path, _written(quality))
    return quality


def parts_of(questions: Questions, *, full: bool) -> int:
    """How often `measure_quality` calls `advance`, counted in ones."""
    probes = questions.probes
    passes = len(probes.shots) + (probes.headline > 1) if full else 1
    return len(questions.windows) + passes * len(questions.tasks)


def _key(contender: Contender, questions: Questions, full: bool) -> str:
    weights = (
        contender.source
        if contender.directory is None
        else sha256_file(contender.directory / "manifest.json")
    )
    facts = [
        SCORING_VERSION,
        weights,
        contender.engine,
        contender.provider,
        questions.teacher_fingerprint,
        questions.text_sha256,
        {name: list(pairs) for name, pairs in questions.tasks.items()},
        asdict(questions.probes),
        full,
        library_versions(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _written(quality: Quality) -> dict[str, Any]:
    suite = quality.probes
    return {
        "windows": {k: v.tolist() for k, v in asdict(quality.windows).items()},
        "by_shots": {str(n): _result_written(r) for n, r in suite.by_shots.items()},
        "control": None if suite.control is None else _result_written(suite.control),
    }


def _result_written(result: ProbeResult) -> dict[str, Any]:
    return {**asdict(result), "tasks": {n: asdict(s) for n, s in result.tasks.items()}}


def _read(path: Path) -> Quality:
    raw = read_json(path)
    windows = WindowScores(**{k: np.array(v) for k, v in raw["windows"].items()})
    by_shots = {int(n): _result_read(r) for n, r in raw["by_shots"].items()}
    control = None if raw["control"] is None else _result_read(raw["control"])
    return Quality(windows, SuiteResult(by_shots, control))


def _result_read(raw: dict[str, Any]) -> ProbeResult:
    tasks = {
        name: TaskScore(
            hit1=tuple(score["hit1"]),
            hit3=tuple(score["hit3"]),
            chance1=score["chance1"],
            exact=None if score["exact"] is None else tuple(score["exact"]),
        )
        for name, score in raw["tasks"].items()
    }
    return ProbeResult(**{**raw, "tasks": tasks})
