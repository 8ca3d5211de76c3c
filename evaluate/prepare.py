"""What a comparison starts from: contenders, text, questions, and the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deploy.ceilings import MeasuredCeilings
from distill.artifact import UserError
from distill.documents import load_documents
from distill.teacher import Loaded, load_teacher
from evaluate.args import EvaluateArgs, whole_numbers
from evaluate.contenders import (
    ENGINE_NAMES,
    GROUP_NAMES,
    PRECISION_ORDER,
    Contender,
    Failure,
    Lineup,
    find_contenders,
)
from evaluate.environment import describe_machine, usable_cores
from evaluate.module_time import ModuleTimes
from evaluate.original import dense_contenders, written_original
from evaluate.probe_suite import ProbeSettings
from evaluate.probe_tasks import load_tasks
from evaluate.quality import Quality, Questions
from evaluate.text_source import EvaluationText, evaluation_text


@dataclass
class Comparison:
    """Everything measured, before it becomes a report. Mappings are keyed by contender id."""

    args: EvaluateArgs
    lineup: Lineup
    original: Path
    contenders: list[Contender]
    text: EvaluationText
    questions: Questions
    threads: int
    machine: dict[str, Any]
    failures: list[Failure]
    ceilings: dict[str, MeasuredCeilings] = field(default_factory=dict)
    footprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)
    latency: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    modules: ModuleTimes | None = None
    notes: list[str] = field(default_factory=list)
    power: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def alive(self) -> list[Contender]:
        """Contenders that nothing has gone wrong with so far."""
        dead = {failure.id for failure in self.failures}
        return [c for c in self.contenders if c.id not in dead]

    def fail(self, contender: Contender, stage: str, error: BaseException) -> None:
        text = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self.failures.append(Failure(contender.id, stage, f"{kind}{text}"[:500]))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long a stage takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began


def prepare(args: EvaluateArgs) -> Comparison:
    """Find the contenders, the text and the questions. Raises: UserError for what the user can put
    right."""
    began = time.monotonic()
    found = find_contenders(args.run)
    tasks, peers = load_tasks(args.probes), _peers(args, found)
    if args.text != "heldout" and not args.text.startswith("hub:"):
        load_documents([args.text], max_tokens=1)  # refused before much is written
    original = written_original(found)
    teacher = loaded_teacher(original, found)
    text = evaluation_text(
        args.text, found.runs, teacher, window=args.window, stride=args.stride, limit=args.windows
    )
    settings = ProbeSettings(
        shots=whole_numbers(args.shots), queries_per_task=args.queries, seed=args.seed
    )
    questions = Questions(
        teacher.tokenizer, text.windows, text.sha256, tasks, settings, found.teacher_fingerprint
    )
    engines = not (args.no_dense_engines or args.quality_only)
    dense, failures = dense_contenders(found, original, engines=engines)
    contenders = _ordered([*dense, *found.contenders, *peers])
    comparison = Comparison(
        args,
        found,
        original,
        contenders,
        text,
        questions,
        args.threads or usable_cores(),
        describe_machine(),
        [*found.failures, *failures],
    )
    comparison.seconds["prepare"] = time.monotonic() - began
    return comparison


def loaded_teacher(original: Path, found: Lineup) -> Loaded:
    """The teacher in float32, from its copy beside the runs."""
    copy = load_teacher(str(original / "student"), dtype=torch.float32)
    return replace(copy, source=found.teacher_source, fingerprint=found.teacher_fingerprint)


def _peers(args: EvaluateArgs, found: Lineup) -> list[Contender]:
    if "llama.cpp" not in args.peer:
        return []
    from evaluate.peer_llama import llama_contender

    return [llama_contender(found)]


def _ordered(contenders: Sequence[Contender]) -> list[Contender]:
    """Dense first, then LoRA, budgeted and SVD by falling budget; PyTorch before engines."""
    groups, engines, precisions = list(GROUP_NAMES), list(ENGINE_NAMES), list(PRECISION_ORDER)

    def order(c: Contender) -> tuple[Any, ...]:
        precision = precisions.index(c.precision) if c.precision in precisions else 99
        return groups.index(c.group), -c.budget, engines.index(c.engine), precision, c.id

    return sorted(contenders, key=order)
