"""A teacher too large for one device, spread over the processes of a run (FSDP2, `fully_shard`).

Every process holds a share of each decoder layer; a layer is gathered while it runs and let go
after. Embeddings, final norm and head stay whole everywhere. What runs such a model must run in all
processes alike, as often and with batches of the same shape: a process that stays away stops the
others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill.artifact import UserError
from distill.statistics import decoder_layers
from distill.teacher import target_modules


def require_equal_shares(accelerator: Accelerator, sequences: int, micro_batch: int) -> None:
    """Raise UserError unless every process gets equally many micro-batches of one size from the
    `sequences` of a step."""
    processes = accelerator.num_processes
    if processes < 2:
        raise UserError(
            "--shard-teacher: this run has one process; needs two or more to spread the teacher "
            "over; start it with accelerate launch --num_processes N -m distill"
        )
    size = max(1, min(micro_batch, sequences // processes))
    if sequences % (size * processes):
        raise UserError(
            f"--shard-teacher: {sequences} sequences a step in micro-batches of {size} do not "
            f"share out evenly among {processes} processes; needs a multiple of {size * processes}"
            " sequences; change --batch-tokens or --micro-batch"
        )


@contextmanager
def one_by_one(accelerator: Accelerator) -> Iterator[None]:
    """The processes take turns, so that the host holds one whole copy of a model at a time."""
    for _ in range(accelerator.process_index):
        accelerator.wait_for_everyone()
    yield
    for _ in range(accelerator.num_processes - accelerator.process_index):
        accelerator.wait_for_everyone()


def shard_layers(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Spread every decoder layer over all processes, in place, and move the rest to the device.

    Each layer is a unit of its own, which may be run alone or as part of the model.
    """
    kind = accelerator.device.type
    mesh = init_device_mesh(kind, (accelerator.num_processes,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(accelerator.device)


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose target modules have no weights yet (they are on the meta device)."""
    weights = [linear.weight for linear in target_modules(model).values()]
    empty = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), False) for w in weights}
    return copy.deepcopy(model, empty)


def whole(weight: Tensor) -> Tensor:
    """The full tensor of a parameter that may be sharded: all processes must ask for it."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
