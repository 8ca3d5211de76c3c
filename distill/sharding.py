"""A teacher too large for one device, spread over the processes of a run (FSDP2, `fully_shard`).

Every process holds a share of each decoder layer; a layer is gathered while it runs and let go
after. Embeddings, final norm and head stay whole everywhere. What runs such a model must run in all
processes, equally often: one that stays away stops the others. So nobody decides by its own look at
the disk whether there is something to run: the main process says.
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill.artifact import UserError
from distill.resources import return_freed_memory
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


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Spread every decoder layer over all processes, in place, and move the rest to the device.

    Each layer is a unit of its own, which may be run alone or as part of the model. No process
    waits for another here.
    """
    world = torch.distributed.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, device.type)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to(device)  # type: ignore[arg-type]
    return_freed_memory()


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose target modules have no weights yet (they are on the meta device)."""
    weights = [linear.weight for linear in target_modules(model).values()]
    empty = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), False) for w in weights}
    return copy.deepcopy(model, empty)


def whole(weight: Tensor) -> Tensor:
    """The full tensor of a parameter that may be sharded: all processes must ask for it."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
