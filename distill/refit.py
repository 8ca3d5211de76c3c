"""Input correction: every module of a student learns, in closed form, to read what it now gets.

Once earlier modules are approximated, a module's input x_s drifts from the x_t that its factors
were made for. The linear map that best predicts x_t from x_s is M = E[x_t x_sᵀ] E[x_s x_sᵀ]⁻¹, and
the best down factor for the new input is A·M (W·M for a kept module): with the up factor fixed,
that is the least-squares answer in any metric of the outputs. Modules are corrected in the order
in which they compute, so that each sees its predecessors corrected; compare the sequential update
of SVD-LLM (arXiv 2403.12983), which refits one side against the original output in the same way.

Shape legend: B batch, T tokens, D hidden, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.statistics import add_outer, decoder_layers, input_key
from distill.student import BudgetedLinear

RIDGE = 1e-2


class _Reached(Exception):
    """The module whose input was wanted has been called."""


@dataclass(frozen=True)
class _Stream:
    """One model's hidden states before the current layer, batch by batch."""

    model: PreTrainedModel
    hidden_BTD: list[Tensor]


@torch.no_grad()
def correct_inputs(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    ids_NT: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda layers: None,
) -> None:
    """Correct every BudgetedLinear of ``student`` in place, on the teacher's calibration text.

    The student must start from the teacher's own architecture and sizes.
    """
    batch_size = min(batch_size, len(ids_NT))
    batches = [
        torch.from_numpy(ids_NT[start : start + batch_size].astype(np.int64)).to(student.device)
        for start in range(0, len(ids_NT) - batch_size + 1, batch_size)
    ]
    arguments = _layer_arguments(teacher, batches[0])
    inputs = [_first_input(teacher, ids_BT) for ids_BT in batches]
    theirs, ours = _Stream(teacher, list(inputs)), _Stream(student, list(inputs))
    for index, kwargs in enumerate(arguments):
        _correct_layer(index, theirs, ours, kwargs)
        advance(1)


def _layer_arguments(model: PreTrainedModel, ids_BT: Tensor) -> list[dict[str, Any]]:
    """Every layer's keyword arguments; they depend on the batch's shape only."""
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    handles = [
        layer.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder_layers(model)
    ]
    try:
        model.model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_input(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the first decoder layer reads."""
    return _stopped(
        decoder_layers(model)[0], lambda: model.model(input_ids=ids_BT, use_cache=False)
    )


def _stopped(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The first argument of ``module`` when ``run`` calls it; nothing after it is computed."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _correct_layer(index: int, theirs: _Stream, ours: _Stream, kwargs: dict[str, Any]) -> None:
    """Correct one layer group by group, then move both streams past it."""
    layer = decoder_layers(ours.model)[index]
    groups: dict[str, list[str]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, BudgetedLinear):
            groups.setdefault(input_key(name), []).append(name)
    readers = [names[0] for names in groups.values()]
    wanted = _advance(theirs, index, readers, kwargs)
    for reader, names in zip(readers, groups.values(), strict=True):
        sums: dict[str, Tensor] = {}
        module = layer.get_submodule(reader)
        for hidden_BTD, wanted_BTI in zip(ours.hidden_BTD, wanted[reader], strict=True):
            with _training_precision(ours.model):
                own_BTI = _stopped(module, partial(layer, hidden_BTD, **kwargs))
            add_outer(sums, "cross", wanted_BTI, own_BTI)
            add_outer(sums, "own", own_BTI, own_BTI)
        map_II = input_map(sums["cross"], sums["own"])
        for name in names:
            corrected = layer.get_submodule(name)
            assert isinstance(corrected, BudgetedLinear)
            corrected.read_through_(map_II)
    _advance(ours, index, [], kwargs)


def _advance(
    stream: _Stream, index: int, readers: list[str], kwargs: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """Run layer ``index`` on every batch; returns what each of ``readers`` read."""
    layer = decoder_layers(stream.model)[index]
    inputs: dict[str, list[Tensor]] = {name: [] for name in readers}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0])
        )
        for name in readers
    ]
    try:
        for batch, hidden_BTD in enumerate(stream.hidden_BTD):
            with _training_precision(stream.model):
                output = layer(hidden_BTD, **kwargs)
            stream.hidden_BTD[batch] = output[0] if isinstance(output, tuple) else output
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _training_precision(model: PreTrainedModel) -> torch.autocast:
    """What training computes in: a bfloat16 student has float32 norms and factors, too."""
    dtype = model.get_input_embeddings().weight.dtype
    half = dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def input_map(cross_II: Tensor, own_II: Tensor) -> Tensor:
    """M = (C + ρI)(S + ρI)⁻¹ in float64 with ρ a hundredth of S's mean diagonal: the identity
    where both inputs are equal, and close to it where the text says too little."""
    cross, own = cross_II.double(), own_II.double()
    mean = own.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    ridge = RIDGE * mean * torch.eye(len(own)).to(own)
    return torch.linalg.solve(own + ridge, cross + ridge, left=False)
