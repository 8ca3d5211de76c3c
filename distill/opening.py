"""The start of a run: processes, folder, models and text, and whether they go together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from transformers import PreTrainedModel

from distill.args import DistilArgs
from distill.artifact import UserError
from distill.hardware import Compute, choose_attention, choose_compute, choose_device
from distill.plan import NEURON_READER, check_rank_multiple, modules_of, units_of
from distill.processes import Crew, made_once, main_first, one_by_one
from distill.rundir import (
    Run,
    claim,
    held,
    note_inputs,
    require_resources,
    require_same_inputs,
    require_unused,
)
from distill.sharding import outline, require_equal_shares, shard_layers
from distill.teacher import Loaded, load_teacher, require_same_tokenizer, target_modules
from distill.text import RunText, prepare_text, self_text_file

WAIT_FOR_MAIN_PROCESS = timedelta(days=1)


def open_run(args: DistilArgs, argv: Sequence[str], stack: ExitStack) -> Run:
    """Lock the folder until ``stack`` closes, load the models, prepare the text; the folder is
    claimed, and with ``--overwrite`` emptied, once nothing that the user gave can be wrong any
    more. What "auto" has come to is recorded, so that a resumed run computes in the same
    precision."""
    compute = _compute(args)
    precision = str(compute.dtype).removeprefix("torch.")
    args = replace(args, device=compute.device.type, dtype=precision)
    accelerator = _accelerator(args, compute)
    with main_first(accelerator):
        if accelerator.is_main_process:
            stack.enter_context(held(args.run_directory))
            if not args.plan_only:
                require_unused(args)
    torch.manual_seed(args.seed)
    teacher, student = _models(args, accelerator, compute)
    cache = args.run_directory.parent / "cache"
    inputs = {"teacher": teacher.fingerprint, "student": student.fingerprint}
    with main_first(accelerator):
        require_same_inputs(args, inputs)
    text = _text(args, accelerator, teacher, cache)
    inputs["text"] = text.fingerprint
    with main_first(accelerator):
        require_same_inputs(args, inputs)
        if accelerator.is_main_process and not args.plan_only:
            note_inputs(args, inputs, more=args.resume)
    return Run(args, argv, args.run_directory, cache, accelerator, compute, teacher, student, text)


def _models(args: DistilArgs, accelerator: Accelerator, compute: Compute) -> tuple[Loaded, Loaded]:
    """Teacher and student, checked and on their device; the teacher's layers spread over the
    processes with ``--shard-teacher``, its student then an outline where it is the same model."""
    with one_by_one(accelerator) if args.shard_teacher else main_first(accelerator):
        teacher = load_teacher(
            args.teacher, dtype=compute.dtype,
            revision=args.revision, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        student = teacher
        if args.student is not None and args.student != args.teacher:
            student = load_teacher(args.student, dtype=compute.dtype)
            require_same_tokenizer(teacher, student)
        _check_models(args, teacher, student)
        require_resources(args, teacher.model, student.model)
        if args.shard_teacher:
            if student is teacher:
                student = replace(teacher, model=outline(teacher.model))
            else:
                student.model.to(accelerator.device)
            shard_layers(teacher.model, accelerator.device)
        for loaded in (teacher, student):
            if not args.shard_teacher:
                loaded.model.to(accelerator.device)
            choose_attention(loaded.model, compute, args.seq_len)
    return teacher, student


def _check_models(args: DistilArgs, teacher: Loaded, student: Loaded) -> None:
    """Raise UserError where the flags and these models do not go together."""
    check_structure(args, student.model)
    for loaded in (teacher, student):
        most = getattr(loaded.model.config, "max_position_embeddings", None)
        if most is not None and args.seq_len > most:
            raise UserError(
                f"--seq-len {args.seq_len}: {loaded.source} takes {most} tokens at most; "
                "use that many or fewer"
            )
    if args.refit_tokens and student.fingerprint != teacher.fingerprint:
        raise UserError(
            f"--refit-tokens {args.refit_tokens}: there is no refit of a --student other than "
            "the teacher; drop --refit-tokens"
        )


def check_structure(args: DistilArgs, student: PreTrainedModel) -> None:
    """Raise UserError where nothing in the model can have a rank or width that the flags allow."""
    modules = modules_of(target_modules(student))
    neurons = {
        m.name.rpartition(".")[0]: np.zeros(m.in_features)
        for m in modules
        if args.narrows and m.name.endswith(NEURON_READER)
    }
    check_rank_multiple(units_of(modules, neurons), args.rank_multiple)


def _text(args: DistilArgs, accelerator: Accelerator, teacher: Loaded, cache: Path) -> RunText:
    """The text of the run, whose folder is claimed before hours are spent on writing some."""
    claims = accelerator.is_main_process and not args.plan_only
    writes_text = args.data == ("self",)
    if claims and writes_text:
        claim(args)
    path = self_text_file(args, teacher, cache)
    only_maker = made_once(accelerator, path) if writes_text else nullcontext()
    if args.shard_teacher and writes_text:
        crew = Crew(accelerator)
        with only_maker:
            return crew.from_main(prepare_text(args, teacher, cache, crew=crew))
    with main_first(accelerator), only_maker:
        text = prepare_text(args, teacher, cache)
    if claims and not writes_text:
        claim(args)
    return text


def _compute(args: DistilArgs) -> Compute:
    """Device and precision; near the threshold the processes would measure differently, so the main
    process says."""
    device = choose_device(args.device)
    state = PartialState(cpu=device.type == "cpu", timeout=WAIT_FOR_MAIN_PROCESS)
    measured = choose_compute(args.device, args.dtype) if state.is_main_process else None
    found = Crew(state).from_main(measured)
    assert found is not None
    return replace(found, device=device)


def _accelerator(args: DistilArgs, compute: Compute) -> Accelerator:
    """Raises UserError when a process would get no sequence of a step.

    A module that feeds removed ones only gets no gradient, which DDP must be told to expect. The
    frozen weights are buffers, the same everywhere. The main process alone writes text, statistics
    and the student, for hours with a large model, while the others wait.
    """
    accelerator = Accelerator(
        cpu=compute.device.type == "cpu",
        mixed_precision="bf16" if compute.dtype == torch.bfloat16 else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        ],
    )
    processes, sequences = accelerator.num_processes, args.batch_tokens // args.seq_len
    if sequences < processes:
        raise UserError(
            f"--batch-tokens {args.batch_tokens}: {sequences} sequences a step for {processes} "
            f"processes; needs one each or more; use at least {processes * args.seq_len}"
        )
    if args.shard_teacher:
        require_equal_shares(accelerator, sequences, args.micro_batch)
    return accelerator
