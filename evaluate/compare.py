"""The comparison: every contender through every stage, one failure never losing the rest.

prepare → ceilings → footprint → perplexity and probes → latency → compressed modules
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distill.artifact import available_memory_bytes
from distill.console import progress
from evaluate.args import EvaluateArgs, whole_numbers
from evaluate.ceilings import measure_ceilings
from evaluate.contenders import Contender
from evaluate.environment import mode_of, power_state
from evaluate.footprint import measure_footprint
from evaluate.latency import scenarios, time_contenders
from evaluate.module_time import TOKEN_COUNTS, calls_of, time_modules
from evaluate.perplexity import TeacherReference
from evaluate.prepare import Comparison, loaded_teacher, prepare
from evaluate.quality import measure_quality, parts_of
from evaluate.runners import Runner, open_contender, release

MEMORY_SHARE = 0.7
MODULE_ROUNDS = 7


def compare(args: EvaluateArgs) -> Comparison:
    """Measure everything. Raises: UserError for what the user can put right."""
    began = time.monotonic()
    comparison = prepare(args)
    comparison.power["before"] = power_state()
    if not args.quality_only:
        with comparison.stage("ceilings"):
            comparison.ceilings = measure_ceilings(comparison.threads)
        with comparison.stage("footprint"):
            _footprints(comparison)
    with comparison.stage("quality"):
        _quality(comparison)
    if not args.quality_only:
        with comparison.stage("latency"):
            _latency(comparison)
        with comparison.stage("modules"):
            _modules(comparison)
    comparison.power["after"] = power_state()
    _drop_mixed_modes(comparison)
    comparison.seconds["total"] = time.monotonic() - began
    return comparison


def _footprints(comparison: Comparison) -> None:
    todo = comparison.alive()
    with progress(len(todo), "load time and memory", unit="contenders") as bar:
        for contender in todo:
            try:
                comparison.footprints[contender.id] = measure_footprint(
                    contender, comparison.threads
                )
            except Exception as error:  # whatever happens to one, the others are measured
                comparison.fail(contender, "footprint", error)
            bar.update(1)


def _quality(comparison: Comparison) -> None:
    """Perplexity and probes, one contender in memory at a time besides the teacher's states."""
    todo, questions = comparison.alive(), comparison.questions
    reference: list[TeacherReference] = []
    total = sum(parts_of(questions, full=_asks_all(c)) for c in todo)
    cache = comparison.lineup.runs[0].parent / "cache" / "evaluate"

    def teacher() -> TeacherReference:
        if not reference:
            model = loaded_teacher(comparison.original, comparison.lineup).model
            reference.append(TeacherReference(model, questions.windows))
        return reference[0]

    torch.set_num_threads(comparison.threads)
    with progress(total, "perplexity and probes", unit="parts") as bar:
        for contender in todo:
            held: list[Runner] = []
            try:
                comparison.quality[contender.id] = measure_quality(
                    _opener(contender, comparison.threads, held),
                    contender, questions, teacher, cache,
                    full=_asks_all(contender), advance=bar.update,
                )  # fmt: skip
            except Exception as error:  # whatever happens to one, the others are measured
                comparison.fail(contender, "quality", error)
            finally:
                release(held.pop() if held else None)


def _asks_all(contender: Contender) -> bool:
    """All shots and the permuted control for the plain models; the headline for their engines."""
    return contender.engine == "pytorch"


def _opener(contender: Contender, threads: int, held: list[Runner]) -> Callable[[], Runner]:
    def opened() -> Runner:
        held.append(open_contender(contender, threads))
        return held[0]

    return opened


def _latency(comparison: Comparison) -> None:
    """Time contenders together, in as many groups as memory asks for, the dense one in each."""
    args = comparison.args
    todo = scenarios(
        whole_numbers(args.prompt_lengths), whole_numbers(args.batch_sizes), args.decode_tokens
    )
    groups = memory_groups(comparison.alive(), comparison.footprints)
    if len(groups) > 1:
        comparison.notes.append(
            f"Memory did not hold every contender at once: timed in {len(groups)} groups, each "
            "with the dense original in it."
        )
    calls = sum(map(len, groups)) * len(todo) * (args.rounds + 1)
    with progress(calls, "latency", unit="calls") as bar:
        for group in groups:
            _time_group(comparison, group, todo, lambda: bar.update(1))


def _time_group(
    comparison: Comparison, group: Sequence[Contender], todo: Any, on_call: Callable[[], None]
) -> None:
    runners: dict[str, Runner] = {}
    for contender in group:
        try:
            runners[contender.id] = open_contender(contender, comparison.threads)
        except Exception as error:
            comparison.fail(contender, "latency", error)
    rows, failed = time_contenders(
        runners, {c.id: c for c in group}, todo, comparison.ceilings,
        rounds=comparison.args.rounds, synchronise=_synchronise, on_call=on_call,
    )  # fmt: skip
    for contender in group:
        if contender.id in failed:
            comparison.fail(contender, "latency", failed[contender.id])
        elif contender.id in runners:
            comparison.latency.setdefault(contender.id, rows[contender.id])
        release(runners.pop(contender.id, None))


def memory_groups(
    contenders: Sequence[Contender],
    footprints: Mapping[str, Mapping[str, Any]],
    available_bytes: int | None = None,
) -> list[list[Contender]]:
    """Contenders in groups whose measured memory fits; the first (dense) one is in every group."""
    if not contenders:
        return []
    free = available_memory_bytes() if available_bytes is None else available_bytes
    need = {c.id: footprints.get(c.id, {}).get("model_memory_bytes", 0) for c in contenders}
    first, *rest = contenders
    groups, held = [[first]], need[first.id]
    for contender in rest:
        if held + need[contender.id] > MEMORY_SHARE * free and len(groups[-1]) > 1:
            groups.append([first])
            held = need[first.id]
        groups[-1].append(contender)
        held += need[contender.id]
    return groups


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _modules(comparison: Comparison) -> None:
    plans = {
        c.run: c.plan
        for c in comparison.contenders
        if c.plan is not None and c.group in ("budgeted", "svd")
    }
    if not plans:
        return
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        comparison.notes.append(
            "Compressed-module times need onnxruntime, which is not installed: "
            "pip install onnxruntime."
        )
        return
    threads = sorted({1, comparison.threads})
    rounds = min(comparison.args.rounds, MODULE_ROUNDS)
    total = calls_of(len(plans), len(threads), rounds, len(TOKEN_COUNTS))
    with progress(total, "compressed modules alone", unit="calls") as bar:
        comparison.modules = time_modules(
            plans, rounds=rounds, threads=threads, on_call=lambda: bar.update(1)
        )


def _drop_mixed_modes(comparison: Comparison) -> None:
    """Figures taken while the power mode changed are no comparison: they are left out."""
    before, after = (mode_of(comparison.power[k]) for k in ("before", "after"))
    if before != after:
        comparison.latency.clear()
        comparison.modules = None
        comparison.notes.append(
            f"The power mode changed during the run ({before} to {after}), so no times are "
            "reported; fix the mode and measure again."
        )
