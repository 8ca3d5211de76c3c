"""The one training loop: every method, budget and process count runs through it.

Sequences are taken in file order; process p of P takes every P-th micro-batch of each global batch,
so that any number of processes computes the same gradient. Checkpoints are safetensors and JSON,
written beside and renamed; a resumed run ends with the weights of an uninterrupted one.

Shape legend: N sequences, B micro-batch, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.artifact import UserError, read_json, recover, staged, write_json
from distill.console import Progress
from distill.data import TokenSet
from distill.distiller import Distiller
from distill.optimizer import (
    cosine_scale,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from distill.statistics import token_weights
from distill.teacher_pass import TeacherPass
from distill.training_log import TrainingLog

GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class LoopSettings:
    """``sequences_per_step`` is the global batch; ``micro_batch`` the sequences that one process
    holds at once; steps run from ``first_step`` to ``last_step`` of ``total_steps``."""

    sequences_per_step: int
    micro_batch: int
    total_steps: int
    first_step: int
    last_step: int
    optimizer: str
    dtype: torch.dtype
    learning_rate: float
    allocation_rate: float
    answer_weight: float
    checkpoint_steps: int
    flops_per_token: float


class Allocation(Protocol):
    """What moves d and g while the loop runs."""

    def before_step(self, step: int) -> None: ...

    def penalty(self) -> Tensor | None: ...

    def after_step(self) -> None: ...

    def macs_fraction(self) -> float: ...

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: dict[str, float]) -> None: ...


def train(
    distiller: Distiller,
    teacher: TeacherPass,
    data: TokenSet,
    settings: LoopSettings,
    allocation: Allocation,
    directory: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Run the steps of ``settings``, going on from the newest checkpoint in ``directory``.

    Writes ``log.jsonl`` and TensorBoard events to ``directory``'s parent. Raises UserError when
    the loss or its gradient is no longer a number.
    """
    optimizer: Any = make_optimizer(
        distiller,
        name=settings.optimizer,
        learning_rate=settings.learning_rate,
        allocation_rate=settings.allocation_rate,
        dtype=settings.dtype,
    )
    if accelerator.is_main_process and directory.parent.exists():
        recover(directory)
    accelerator.wait_for_everyone()
    start = load_checkpoint(directory, distiller, optimizer, allocation, settings)
    model, optimizer = accelerator.prepare(distiller, optimizer)
    weights_NT = token_weights(data.answer_NT, settings.answer_weight)
    log = TrainingLog(directory.parent, start, accelerator.is_main_process)
    tokens_per_step = settings.sequences_per_step * data.ids_NT.shape[1]
    progress.update((start - settings.first_step) * tokens_per_step)
    for step in range(start, settings.last_step):
        began = time.perf_counter()
        set_learning_rate(optimizer, cosine_scale(step, settings.total_steps))
        allocation.before_step(step)
        measured = _step(model, teacher, data, weights_NT, step, settings, allocation, accelerator)
        measured["gradient_norm"] = float(
            accelerator.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        )
        if not all(map(math.isfinite, measured.values())):
            raise UserError(
                f"the loss became {measured['loss']} with a gradient of norm "
                f"{measured['gradient_norm']} at step {step}; expected numbers; "
                "start again with a smaller --learning-rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        allocation.after_step()
        speed = tokens_per_step / (time.perf_counter() - began)
        measured |= {
            "macs_fraction": allocation.macs_fraction(),
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_s": speed,
            "flops_per_s": speed * settings.flops_per_token,
        }
        log.write(step + 1, (step + 1) * tokens_per_step, measured)
        terms = ("kl", "hidden") if measured["hidden"] else ("kl",)
        shown = {key: measured[key] for key in ("loss", *terms, "macs_fraction")}
        progress.update(tokens_per_step, **shown)
        done = step + 1
        if accelerator.is_main_process and (
            done == settings.last_step or done % settings.checkpoint_steps == 0
        ):
            save_checkpoint(directory, done, distiller, optimizer, allocation)
    log.close()
    accelerator.free_memory()


def _step(
    model: nn.Module,
    teacher: TeacherPass,
    data: TokenSet,
    weights_NT: Tensor,
    step: int,
    settings: LoopSettings,
    allocation: Allocation,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Accumulate the gradient of one global batch; returns its loss terms, averaged."""
    batches = list(_micro_batches(step, settings, accelerator, len(data)))
    sums = torch.zeros(3)
    for index, rows in enumerate(batches):
        ids_BT = torch.from_numpy(data.ids_NT[rows].astype(np.int64)).to(accelerator.device)
        blocks = [b.to(accelerator.device) for b in teacher.blocks(rows)]
        weight_BT = weights_NT[rows].to(accelerator.device)
        share = len(rows) * accelerator.num_processes / settings.sequences_per_step
        with _synchronised(model, accelerator, last=index == len(batches) - 1):
            with accelerator.autocast():
                loss = model(ids_BT, blocks, weight_BT)
                total = loss.total * share
                penalty = allocation.penalty() if index == 0 else None
                if penalty is not None:
                    total = total + penalty
            accelerator.backward(total)
        sums += share * torch.stack([loss.total.detach(), loss.kl, loss.hidden]).float().cpu()
    mean = accelerator.reduce(sums.to(accelerator.device), "mean").tolist()
    return dict(zip(("loss", "kl", "hidden"), mean, strict=True))


def _micro_batches(
    step: int, settings: LoopSettings, accelerator: Accelerator, sequences: int
) -> Iterator[np.ndarray]:
    """This process's share of the micro-batches that one process would take: the hidden-state
    term is relative to its micro-batch, so the same ones give the same gradient."""
    count, processes = settings.sequences_per_step, accelerator.num_processes
    rows = (step * count + np.arange(count)) % sequences
    size = min(settings.micro_batch, count // processes)
    for start in range(size * accelerator.process_index, count, size * processes):
        yield rows[start : start + size]


def _synchronised(model: nn.Module, accelerator: Accelerator, *, last: bool) -> Any:
    """Gradients are exchanged between processes on a step's last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def save_checkpoint(
    directory: Path,
    step: int,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    allocation: Allocation,
) -> None:
    """Replace the checkpoint in ``directory`` by one that has done ``step`` steps."""
    names = list(distiller.named_parameters())
    trained = {n: p.detach().contiguous() for n, p in names if p.requires_grad}
    with staged(directory) as partial:
        save_file(trained, partial / "parameters.safetensors")
        save_file(optimizer_tensors(optimizer, names), partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step, "allocation": allocation.state()})


def load_checkpoint(
    directory: Path,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    allocation: Allocation,
    settings: LoopSettings,
) -> int:
    """Steps already done; restores parameters, optimiser and allocation when there are any."""
    if not (directory / "state.json").exists():
        return settings.first_step
    state = read_json(directory / "state.json")
    if not settings.first_step < state["step"] <= settings.last_step:
        return settings.first_step
    names = list(distiller.named_parameters())
    trained = load_file(directory / "parameters.safetensors")
    with torch.no_grad():
        for name, parameter in names:
            if parameter.requires_grad:
                parameter.copy_(trained[name])
    load_optimizer_tensors(optimizer, names, load_file(directory / "optimizer.safetensors"))
    allocation.load_state(state["allocation"])
    return int(state["step"])
