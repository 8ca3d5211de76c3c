"""The parity gate: an exported graph must compute what the PyTorch student computes, on real text.

The graph runs in ONNX Runtime through `OrtModel`; the student runs in PyTorch in float32. A graph
that fails is refused with the figure that failed and the first decoder block that diverges.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from distill.artifact import UserError
from distill.console import progress
from export.parity_bfloat16 import needs_widening, widened
from export.parity_cases import (
    DECODE_PROMPT,
    DECODE_STEPS,
    Case,
    profile_end,
    routes,
    text_windows,
)
from export.parity_figures import LIMITS, CaseFigures, Limits, ParityReport, Tally
from export.parity_gate import Gate, Refusal
from export.parity_layers import first_divergence
from export.parity_reference import Reference
from export.session import OrtModel

TEXT = Path(__file__).with_name("parity_text.txt")
MAX_WINDOWS = 4
LEAST_TOKENS = 64


class ParityError(UserError):
    """A graph that does not compute what its student computes."""


def check_parity(
    student_directory: Path,
    onnx_directory: Path,
    *,
    precision: str,
    text: str | None = None,
    text_ids: Sequence[int] | None = None,
    max_seq: int = 512,
    max_past: int = 2047,
    provider: str | None = None,
    threads: int | None = None,
    limits: Limits | None = None,
    reference: Reference | None = None,
    name: str | None = None,
    show_progress: bool = True,
) -> ParityReport:
    """Compare a graph with its student; under a minute for 135M parameters on two cores.

    Args:
        text: compared on up to 1,024 of its tokens; None: a built-in passage. `text_ids`: the same
            as token ids.
        max_seq: longest call, `max_past` longest cache (tokens); cut to the model's context.
        limits: what may differ; None: `LIMITS[precision]`.
        reference: the opened student, for callers that check several graphs of it.
        name: what a refusal calls the graph; None: its directory.
    Raises: ParityError with the figure that failed; UserError when a directory cannot be read or
        the provider cannot run the graph.
    """
    if precision not in LIMITS:
        raise UserError(f"precision {precision!r}; allowed are {', '.join(LIMITS)}; choose one")
    began = time.monotonic()
    directory, allowed = Path(onnx_directory), limits or LIMITS[precision]
    with ExitStack() as stack:
        runs_in = directory
        if precision == "bf16" and needs_widening(directory, provider):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runs_in = widened(directory, temporary)
        model = OrtModel.open(runs_in, provider=provider, threads=threads)
        student = reference or Reference(student_directory)
        ids_N = _token_ids(Path(student_directory), text, text_ids, model.vocabulary)
        gate = Gate(precision, model, student, allowed)
        try:
            tally, cases, same_steps = _run(gate, ids_N, max_seq, max_past, show_progress)
        except Refusal as refusal:
            where = ""
            if refusal.ran:
                where = first_divergence(model, student, refusal.case, allowed.layer) + "; "
            raise ParityError(
                f"{name or directory} differs from {student_directory} in {refusal.case.name}: "
                f"{refusal.figure}; {where}nothing was kept, report this or choose another "
                "--precision"
            ) from None
    return _report(
        precision=precision,
        provider=model.provider,
        arithmetic=precision if runs_in == directory else "fp32",
        reference=student.arithmetic,
        tally=tally,
        cases=tuple(cases),
        same_steps=same_steps,
        seconds=time.monotonic() - began,
    )


def _run(
    gate: Gate, ids_N: np.ndarray, max_seq: int, max_past: int, show_progress: bool
) -> tuple[Tally, list[CaseFigures], list[bool]]:
    """Text first, then every case; the last part says which decode steps chose as the student."""
    windows = text_windows(ids_N, MAX_WINDOWS)
    with progress(None, "parity", unit="cases", enabled=show_progress) as shown:
        tally = gate.check_text(windows)
        shown.update(len(windows))
        figures, same_steps = [], []
        for case in _cases(gate.student, ids_N, max_seq, max_past):
            found, same = gate.check_case(case)
            figures.append(found)
            if case.name == "decode":
                same_steps = same[-DECODE_STEPS:]
            shown.update(1)
    return tally, figures, same_steps


def _cases(student: Reference, ids_N: np.ndarray, max_seq: int, max_past: int) -> list[Case]:
    context = int(student.config.max_position_embeddings)
    greedy_T = student.greedy(ids_N[:DECODE_PROMPT], DECODE_STEPS)
    longest = min(max_past, context - 1)
    return [
        *routes(ids_N, greedy_T, student.sliding_window),
        profile_end(ids_N, min(max_seq, context), longest),
    ]


def _token_ids(
    student_directory: Path, text: str | None, text_ids: Sequence[int] | None, vocabulary: int
) -> np.ndarray:
    """The text's token ids. Raises: UserError when there are too few or one is not in the model."""
    if text_ids is not None:
        ids_N = np.asarray(text_ids, dtype=np.int64)
    else:
        if text is None:
            text = TEXT.read_text(encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                student_directory, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{student_directory} has no tokenizer that can be read ({error}); needs the files "
                "that distil wrote; distil it again"
            ) from error
        ids_N = np.asarray(tokenizer(text, verbose=False).input_ids, dtype=np.int64)
    if len(ids_N) < LEAST_TOKENS or ids_N.min() < 0 or ids_N.max() >= vocabulary:
        raise UserError(
            f"the parity text has {len(ids_N)} tokens; needs at least {LEAST_TOKENS}, each below "
            f"the vocabulary of {vocabulary}; give a longer text with --parity-text"
        )
    return ids_N


def _report(
    *,
    precision: str,
    provider: str,
    arithmetic: str,
    reference: str,
    tally: Tally,
    cases: tuple[CaseFigures, ...],
    same_steps: list[bool],
    seconds: float,
) -> ParityReport:
    return ParityReport(
        precision=precision,
        provider=provider,
        arithmetic=arithmetic,
        reference=reference,
        tokens=tally.positions,
        max_logit_difference=tally.max_difference,
        mean_logit_difference=tally.difference / tally.values,
        kl=tally.mean_kl,
        top1_agreement=tally.agreement,
        ties=tally.ties,
        cross_entropy=tally.expected_nll / tally.scored,
        cross_entropy_change=tally.cross_entropy_change,
        perplexity_ratio=math.exp(tally.cross_entropy_change),
        greedy_matches=sum(same_steps),
        greedy_prefix=[*same_steps, False].index(False),
        greedy_steps=len(same_steps),
        cases=cases,
        seconds=seconds,
    )
