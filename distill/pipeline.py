"""One run, from the teacher to a committed student: text → statistics → plan → refit → training."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from distill.allocation import LearnedAllocation, ScheduledAllocation
from distill.args import DistilArgs
from distill.artifact import UserError, require_disk, staged
from distill.baseline import attach_lora, merge_lora
from distill.console import progress
from distill.distiller import Distiller
from distill.factors import (
    FactorStore,
    factor_model,
    factors_key,
    lend_layers,
    open_factors,
)
from distill.finish import commit_student, measure_heldout, print_utilisation
from distill.hardware import choose_attention, training_flops_per_token
from distill.opening import open_run
from distill.plan import (
    Decision,
    Plan,
    keep_decisions,
    modules_of,
    spectral_decisions,
    uniform_decisions,
    units_of,
)
from distill.processes import Crew, made_once, main_first
from distill.quiet import quiet_transformers
from distill.refit import refit_modules
from distill.rundir import (
    Run,
    clear_checkpoints,
    finished_student,
    note_inputs,
    require_same_inputs,
)
from distill.statistics import token_weights
from distill.structure import build_learned, build_structure, densify
from distill.student import budgeted_modules, merge
from distill.student_format import load_student, save_student
from distill.summary import print_plan
from distill.teacher import target_modules
from distill.teacher_pass import (
    LiveTeacher,
    TeacherPass,
    cache_bytes,
    cache_key,
    open_cache,
    write_cache,
)
from distill.train import Allocation, LoopSettings, train

LEARNED_SHARE = 0.4
GIB = 2**30


def distil(args: DistilArgs, argv: Sequence[str]) -> Path | None:
    """Carry out one run and return the student's directory (None with --plan-only).

    Raises UserError for everything that the user can put right.
    """
    began = time.monotonic()
    if args.resume and not args.plan_only and (done := finished_student(args)):
        if os.environ.get("RANK", "0") == "0":
            print(f"student: {done} (finished before; nothing to resume)")
        return done
    with ExitStack() as stack:
        run = open_run(args, argv, stack)
        store = None if run.keeps_all else _factors(run)
        plan = _plan(run, store)
        if args.plan_only:
            _announce(run, plan)
            return None
        student, plan = _train(run, store, plan)
        seconds = time.monotonic() - began
        if run.accelerator.is_main_process or args.shard_teacher:
            heldout = measure_heldout(run, student)
        if run.accelerator.is_main_process:
            commit_student(run, student, plan, heldout, seconds)
            clear_checkpoints(run.directory)
        run.accelerator.wait_for_everyone()
    return run.directory / "student"


def _factors(run: Run) -> FactorStore:
    """The calibration stage, made once for all budgets beside this run."""
    form = run.args.factor_forms[0]
    origin = f"{run.student.fingerprint}|{run.compute.dtype}"
    key = factors_key(origin, run.text.calibration, form, run.args.answer_weight)
    model = run.teacher.model if run.starts_from_teacher else run.student.model
    directory = run.cache / f"factors-{key}"
    with made_once(run.accelerator, directory):
        return _factor_store(run, model, directory, form)


def _factor_store(run: Run, model: PreTrainedModel, directory: Path, form: str) -> FactorStore:
    """The store in ``directory``, made where there is none or a damaged one."""
    settings: dict[str, Any] = {
        "form": form,
        "memory_bytes": int(run.args.statistics_memory_gib * GIB),
        "micro_batch": run.args.micro_batch,
        "answer_weight": run.args.answer_weight,
        "seed": run.args.seed,
    }
    crew = Crew(run.accelerator)
    with main_first(run.accelerator):
        store = _sound_factors(directory, form) if crew.writes else None
    if run.args.shard_teacher and model is run.teacher.model:
        if not crew.from_main(store is not None) and not crew.writes:
            lend_layers(model, run.text.calibration, **settings)
    with main_first(run.accelerator):
        if not crew.writes:
            return open_factors(directory)
        return store or factor_model(model, run.text.calibration, directory, **settings)


def _sound_factors(directory: Path, form: str) -> FactorStore | None:
    """A finished store; None where there is none, or one that can only be made anew: damaged, or
    another version's."""
    if not directory.exists():
        return None
    try:
        store = open_factors(directory)
    except UserError as error:
        print(f"{str(error).partition(';')[0]}; the statistics are made anew", file=sys.stderr)
        return None
    return store if store.form == form else None


def _plan(run: Run, store: FactorStore | None) -> Plan | None:
    """The plan before training; None where d and g are still to be learned."""
    args = run.args
    if run.keeps_all or store is None:
        shapes = modules_of(target_modules(run.student.model))
        return _as_plan(run, keep_decisions(shapes), budget=1.0)
    units = units_of(store.modules, store.neurons)
    if args.method == "svd" or args.allocation == "uniform":
        return _as_plan(run, uniform_decisions(units, args.budget, args.rank_multiple))
    spectral = _as_plan(run, spectral_decisions(units, args.budget, args.rank_multiple))
    return spectral if args.allocation == "spectral" else None


def _as_plan(run: Run, decisions: Sequence[Decision], budget: float | None = None) -> Plan:
    args = run.args
    return Plan(
        args.budget if budget is None else budget,
        args.method,
        args.allocation if args.method == "budgeted" else "keep" if budget else "uniform",
        args.rank_multiple,
        tuple(decisions),
    )


def _announce(run: Run, plan: Plan | None) -> None:
    assert plan is not None
    if run.accelerator.is_main_process:
        print_plan(plan)
        if (run.directory / "student").exists():
            print(f"{run.directory / 'plan.json'} is left as its finished student was made by")
            return
        run.directory.mkdir(parents=True, exist_ok=True)
        plan.save(run.directory / "plan.json")
        print(f"plan: {run.directory / 'plan.json'}")
        print("train it: the same command without --plan-only")


def _train(run: Run, store: FactorStore | None, plan: Plan | None) -> tuple[PreTrainedModel, Plan]:
    """Train in the structure of ``plan`` (learned first where it is None) and merge."""
    student = copy.deepcopy(run.student.model)
    if run.args.budget >= 1 and run.args.method != "lora" and run.starts_from_teacher:
        assert plan is not None
        return student, plan
    teacher = _teacher_pass(run)
    if run.args.method == "lora":
        assert plan is not None
        adapted = attach_lora(student, run.args.lora_rank)
        _heal(run, teacher, student, plan, first_step=0, anneal_steps=0)
        return merge_lora(adapted), plan
    first_step, reference = 0, run.teacher.model
    if plan is None:
        assert store is not None
        first_step = max(1, round(LEARNED_SHARE * run.steps))
        student, store, plan = _allocate(run, teacher, student, store, first_step)
        reference = copy.deepcopy(student)
    _require_same_plan(run, store, plan)
    anneal_steps = round(run.args.anneal * (run.steps - first_step))
    build_structure(
        student, plan, store, lora_rank=run.args.lora_rank, anneal=anneal_steps > 0,
        weights=run.teacher.model if run.args.shard_teacher and run.starts_from_teacher else None,
    )  # fmt: skip
    student.to(run.accelerator.device)  # type: ignore[arg-type]
    refits = run.args.method == "budgeted" and not anneal_steps and run.starts_from_teacher
    if refits and store is not None and len(run.text.refit):
        _refit(run, reference, student, store)
    if plan.macs < plan.dense_macs or not run.starts_from_teacher:
        _heal(run, teacher, student, plan, first_step=first_step, anneal_steps=anneal_steps)
    return merge(student, plan, run.compute.dtype), plan


def plan_fingerprint(plan: Plan, store: FactorStore | None) -> str:
    """Names a plan by its decisions and the neurons that stay, in their order."""
    digest = hashlib.sha256(repr([(d.module, d.action, d.rank) for d in plan.decisions]).encode())
    for block, width in plan.widths.items():
        assert store is not None
        digest.update(store.neuron_order(block)[:width].numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_same_plan(run: Run, store: FactorStore | None, plan: Plan) -> None:
    """A checkpoint knows its modules by rank and its neurons by place: a plan that statistics made
    anew, elsewhere perhaps, have turned into another one is not gone on with."""
    inputs = {"plan": plan_fingerprint(plan, store)}
    require_same_inputs(run.args, inputs)
    if run.accelerator.is_main_process:
        note_inputs(run.args, inputs, more=True)


def _refit(
    run: Run, reference: PreTrainedModel, student: PreTrainedModel, store: FactorStore
) -> None:
    """Closed-form refit to the model that the student was factored from. Every process computes the
    same."""
    args = run.args
    layers = student.config.num_hidden_layers
    is_main, refit = run.accelerator.is_main_process, run.text.refit
    weights_NT = token_weights(refit.answer_NT, args.answer_weight)
    with progress(layers, "refit", unit="layers", enabled=is_main) as bar:
        refit_modules(
            reference, student, store, refit.ids_NT, args.micro_batch, bar.update,
            weights_NT=None if args.answer_weight == 1 else weights_NT,
        )  # fmt: skip


def _allocate(
    run: Run, teacher: TeacherPass, student: PreTrainedModel, store: FactorStore, steps: int
) -> tuple[PreTrainedModel, FactorStore, Plan]:
    """Learn d and g for ``steps`` steps, make every module dense again at its effective weight,
    factor that and let the knapsack decide; committed, so that a resumed run does not repeat it."""
    args, committed = run.args, run.directory / "allocated"
    if not committed.exists():
        prior = None
        if args.allocation == "spectral+learned":
            decisions = spectral_decisions(store.modules, args.budget, args.rank_multiple)
            prior = _as_plan(run, decisions)
        build_learned(student, store, prior)
        modules = list(budgeted_modules(student).values())
        allocation = LearnedAllocation(modules, args.budget, steps)
        everything = _as_plan(run, keep_decisions(store.modules))
        _loop(run, teacher, student, everything, allocation, "allocate", 0, steps)
        if run.accelerator.is_main_process:
            with quiet_transformers(), staged(committed) as partial:
                save_student(partial, densify(student), run.student.tokenizer, {})
        run.accelerator.wait_for_everyone()
    student = load_student(committed, run.compute.dtype).to(run.accelerator.device)
    choose_attention(student, run.compute, args.seq_len)
    directory = run.directory / "allocated-factors"
    store = _factor_store(run, student, directory, args.factor_forms[-1])
    units = units_of(store.modules, store.neurons)
    decisions = spectral_decisions(units, args.budget, args.rank_multiple)
    return student, store, _as_plan(run, decisions)


def _heal(
    run: Run,
    teacher: TeacherPass,
    student: PreTrainedModel,
    plan: Plan,
    *,
    first_step: int,
    anneal_steps: int,
) -> None:
    allocation = ScheduledAllocation(budgeted_modules(student), plan, first_step, anneal_steps)
    _loop(run, teacher, student, plan, allocation, "distil", first_step, run.steps)


def _loop(
    run: Run,
    teacher: TeacherPass,
    student: PreTrainedModel,
    plan: Plan,
    allocation: Allocation,
    title: str,
    first_step: int,
    last_step: int,
) -> None:
    args = run.args
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    settings = LoopSettings(
        sequences_per_step=args.batch_tokens // args.seq_len,
        micro_batch=args.micro_batch,
        total_steps=run.steps,
        first_step=first_step,
        last_step=last_step,
        optimizer=args.optimizer,
        dtype=run.compute.dtype,
        learning_rate=args.learning_rate,
        allocation_rate=args.allocation_rate,
        answer_weight=args.answer_weight,
        checkpoint_steps=args.checkpoint_steps,
        flops_per_token=training_flops_per_token(
            plan, student, args.lora_rank, args.seq_len,
            live_teacher=isinstance(teacher, LiveTeacher),
        ),
    )  # fmt: skip
    name = "checkpoint" if title == "distil" else f"checkpoint-{title}"
    distiller = Distiller(student, run.teacher.model, args.hidden_weight)
    tokens = (last_step - first_step) * args.batch_tokens
    with progress(tokens, title, enabled=run.accelerator.is_main_process) as bar:
        train(
            distiller, teacher, run.text.train, settings, allocation,
            run.directory / name, run.accelerator, bar,
        )  # fmt: skip
    student.eval()
    print_utilisation(run)


def _teacher_pass(run: Run) -> TeacherPass:
    """Outputs from disk where they fit ``--cache-gib`` and one process trains; else live. Without
    the hidden-state term the last block's are enough."""
    args, model, ids_NT = run.args, run.teacher.model, run.text.train.ids_NT
    blocks = model.config.num_hidden_layers if args.hidden_weight else 1
    need = cache_bytes(model, ids_NT.size, blocks)
    fits = need <= args.cache_gib * GIB and run.accelerator.num_processes == 1
    if args.teacher_pass == "live" or (args.teacher_pass == "auto" and not fits):
        return LiveTeacher(model, ids_NT, blocks)
    key = cache_key(f"{run.teacher.fingerprint}|{run.compute.dtype}", ids_NT)
    directory = run.cache / f"teacher-{key}{'' if args.hidden_weight else '-last'}"
    with main_first(run.accelerator), made_once(run.accelerator, directory):
        cached = open_cache(model, ids_NT, directory, blocks)
        have = cached.path.stat().st_size if cached.path.exists() else 0
        lacks = max(0, need - have)
        require_disk(run.cache, lacks, "the teacher's outputs (or --teacher-pass live)")
        with progress(int(np.prod(ids_NT.shape)), "teacher pass") as bar:
            return write_cache(
                model, ids_NT, directory,
                blocks=blocks, batch_size=args.micro_batch, advance=bar.update,
            )  # fmt: skip
