"""Sequential refit: every module of a student learns, in closed form, to make up for what is lost.

Once earlier modules are approximated, a module's input x_s drifts from the teacher's x_t, and the
residual stream h_s that its block adds to lags behind the teacher's h_t. The weight that best
answers both is the least-squares map from x_s to the target that the teacher sets: W x_t for a
module inside a branch, W x_t + (h_t − h_s) for one that writes to the stream (o_proj, down_proj).
It has a closed form in second moments,

    W* = (W E[x_t x_sᵀ] + E[(h_t − h_s) x_sᵀ]) E[x_s x_sᵀ]⁻¹,

and a module that the plan approximates takes the two-sided SVD of W* in the metric of its own
inputs. Modules are refitted in the order in which they compute, so that each sees its predecessors
refitted. The sequential update of SVD-LLM (arXiv 2403.12983) refits one factor to the module's own
output; that the later module also pays what the stream lacks is what wins here (docs/distil.md).

Shape legend: B batch, T tokens, D hidden, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.factors import FactorStore
from distill.lowrank import damped, two_sided_svd
from distill.sharding import whole
from distill.statistics import decoder_layers, input_key
from distill.student import BudgetedLinear

RIDGE = 3e-2
# What adds to the residual stream, and the norm that reads the stream just before it is added to.
ATTENTION_OUT, MLP_OUT, MIDDLE = "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"
STREAM_WRITERS = {ATTENTION_OUT: "input_layernorm", MLP_OUT: MIDDLE}


class _Reached(Exception):
    """The module whose input was wanted has been called."""


@dataclass(frozen=True)
class _Stream:
    """One model's hidden states before the current layer, batch by batch, and what the layer's
    o_proj reads, once that is known. ``weights_BT``: how often positions count, where that differs.
    """

    model: PreTrainedModel
    hidden_BTD: list[Tensor]
    attended_BTI: list[Tensor] = field(default_factory=list)
    weights_BT: Sequence[Tensor] | None = None

    def layer_output(self, index: int, batch: int, kwargs: dict[str, Any]) -> Tensor:
        """Run layer ``index`` on one batch in training precision."""
        layer = decoder_layers(self.model)[index]
        with self._attention_from(layer, batch), _training_precision(self.model):
            output = layer(self.hidden_BTD[batch], **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _attention_from(self, layer: nn.Module, batch: int) -> Iterator[None]:
        """Attention is the costliest part of a layer: compute it once, then project what is known
        with o_proj as it stands."""
        if not self.attended_BTI:
            yield
            return
        attention, project = layer.self_attn, layer.get_submodule(ATTENTION_OUT)
        assert isinstance(attention, nn.Module)
        read_BTI = self.attended_BTI[batch]
        attention.forward = lambda *args, **kwargs: (project(read_BTI), None)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del attention.forward


@torch.no_grad()
def refit_modules(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    store: FactorStore,
    ids_NT: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda layers: None,
    *,
    weights_NT: Tensor | None = None,
) -> None:
    """Refit every BudgetedLinear of ``student`` in place, on the teacher's calibration text.

    The student must start from the teacher's own architecture and sizes. ``store`` has the output
    metric of every module that is approximated. ``weights_NT``: how often each position counts in
    the least squares; None: once.
    """
    batch_size = min(batch_size, len(ids_NT))
    batches = [
        torch.from_numpy(ids_NT[start : start + batch_size].astype(np.int64)).to(student.device)
        for start in range(0, len(ids_NT) - batch_size + 1, batch_size)
    ]
    weights = None if weights_NT is None else weights_NT.to(student.device).split(batch_size)
    arguments = _layer_arguments(teacher, batches[0])
    inputs = [_first_input(teacher, ids_BT) for ids_BT in batches]
    theirs = _Stream(teacher, list(inputs))
    ours = _Stream(student, list(inputs), weights_BT=weights)
    for index, kwargs in enumerate(arguments):
        _refit_layer(index, theirs, ours, store, kwargs)
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

    handle = module.register_forward_pre_hook(stop, prepend=True)  # before a sharded one gathers
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _refit_layer(
    index: int, theirs: _Stream, ours: _Stream, store: FactorStore, kwargs: dict[str, Any]
) -> None:
    """Refit one layer, group by group of modules that read the same, then move both streams on."""
    layer, reference = (decoder_layers(stream.model)[index] for stream in (ours, theirs))
    groups: dict[str, list[str]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, BudgetedLinear):
            groups.setdefault(input_key(name), []).append(name)
    writers = stream_writers(layer)
    readers = {names[0] for names in groups.values()}
    wanted = _advance(theirs, index, (readers - {*writers}) | {*writers.values()}, kwargs)
    if writers:  # the teacher's stream once it has been added to
        wanted |= {ATTENTION_OUT: wanted[MIDDLE], MLP_OUT: theirs.hidden_BTD}
    for names in groups.values():
        reader = names[0]
        targets, own_II = _moments(ours, index, reader, writers.get(reader), wanted[reader], kwargs)
        for name in names:
            module = layer.get_submodule(name)
            linear = reference.get_submodule(name)
            assert isinstance(module, BudgetedLinear) and isinstance(linear, nn.Linear)
            whole_OI = whole(linear.weight)
            weight_OI = whole_OI if module.dense_OI is None else module.dense_OI
            # a narrowed down_proj still answers to all of the neurons that the teacher's reads
            teachers_OI = whole_OI if module.in_features < linear.in_features else weight_OI
            target_OI = targets if reader in writers else teachers_OI.float() @ targets
            best_OI = refitted_weight(weight_OI, target_OI, own_II)
            _put(module, best_OI, own_II, store, f"model.layers.{index}.{name}")
    _advance(ours, index, set(), kwargs)


def refit_width(model: PreTrainedModel) -> int:
    """Values that the refit holds per token at most: both streams before and after a layer, and
    what the layer's modules read."""
    config, layer = model.config, decoder_layers(model)[0]
    attended = layer.get_submodule(ATTENTION_OUT).in_features
    assert isinstance(attended, int)
    inner = 0 if stream_writers(layer) else config.intermediate_size
    return int(6 * config.hidden_size + 2 * attended + inner)


def stream_writers(layer: nn.Module) -> dict[str, str]:
    """STREAM_WRITERS, or none where a norm stands between a projection and the stream (Gemma)."""
    return {} if hasattr(layer, "pre_feedforward_layernorm") else STREAM_WRITERS


def _moments(
    ours: _Stream,
    index: int,
    reader: str,
    norm: str | None,
    wanted: list[Tensor],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Weighted sums Σ z x_sᵀ and Σ x_s x_sᵀ over all tokens, x_s being what ``reader`` reads, and z
    being ``wanted`` or, where ``norm`` reads the stream that ``reader`` adds to, what it lacks."""
    sums: dict[str, Tensor] = {}
    layer, attended_BTI = decoder_layers(ours.model)[index], []
    bias_O = layer.get_submodule(reader).bias
    assert bias_O is None or isinstance(bias_O, Tensor)
    for batch in range(len(ours.hidden_BTD)):
        stream: list[Tensor] = []
        with _inputs_of(layer, {} if norm is None else {norm: stream}):
            own_BTI = _stopped(
                layer.get_submodule(reader), partial(ours.layer_output, index, batch, kwargs)
            )
        if reader == ATTENTION_OUT:
            attended_BTI.append(own_BTI)
        z = wanted[batch].float()
        if norm is not None:
            z = z - stream[0].float() - (0 if bias_O is None else bias_O.float())
        if ours.weights_BT is not None:
            root_BT1 = ours.weights_BT[batch].sqrt()[..., None]
            z, own_BTI = z * root_BT1, own_BTI * root_BT1.to(own_BTI.dtype)
        _add_product(sums, "target", z.to(own_BTI.dtype), own_BTI)
        _add_product(sums, "own", own_BTI, own_BTI)
    ours.attended_BTI.extend(attended_BTI)
    return sums["target"], sums["own"]


def _add_product(sums: dict[str, Tensor], key: str, z_BTO: Tensor, x_BTI: Tensor) -> None:
    """Add Σ z xᵀ over all tokens of a batch to ``sums[key]`` (O, I) in float32. Two bfloat16 sides
    are multiplied as such, four times as fast on a CPU: what one batch's product loses to rounding
    averages out over the batches and stays far below the ridge."""
    product_OI = z_BTO.flatten(0, -2).T @ x_BTI.flatten(0, -2)
    sums[key] = sums[key].add_(product_OI) if key in sums else product_OI.float()


def _put(
    module: BudgetedLinear,
    weight_OI: Tensor,
    own_II: Tensor,
    store: FactorStore,
    name: str,
) -> None:
    """The refitted weight in the form of the module's decision. A pair's is the nearest in the
    metric by which the least squares on ``own_II``, with their ridge, weigh a change of its rows.
    """
    if module.dense_OI is not None:
        module.dense_OI.copy_(weight_OI.to(module.dense_OI.dtype))
        return
    metric_OO = store.gradient_moment(name).to(weight_OI.device)
    factors = two_sided_svd(weight_OI, damped(own_II, RIDGE), metric_OO)
    up_OR, down_RI = factors.truncated(module.down.shape[0])
    module.up.copy_(up_OR)
    module.down.copy_(down_RI)


def _advance(
    stream: _Stream, index: int, readers: set[str], kwargs: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """Move the stream past layer ``index``; returns what each of ``readers`` read."""
    layer = decoder_layers(stream.model)[index]
    inputs: dict[str, list[Tensor]] = {name: [] for name in readers}
    with _inputs_of(layer, inputs):
        for batch in range(len(stream.hidden_BTD)):
            stream.hidden_BTD[batch] = stream.layer_output(index, batch, kwargs)
    stream.attended_BTI.clear()
    return inputs


@contextmanager
def _inputs_of(layer: nn.Module, inputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Append to each list what the module of that name reads."""

    def recorder(found: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: found.append(args[0])

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(recorder(found))
        for name, found in inputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _training_precision(model: PreTrainedModel) -> torch.autocast:
    """What training computes in: a bfloat16 student has float32 norms and factors, too."""
    dtype = model.get_input_embeddings().weight.dtype
    half = dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def refitted_weight(weight_OI: Tensor, target_OI: Tensor, own_II: Tensor) -> Tensor:
    """(T + ρW)(S + ρI)⁻¹ in float64 from the sums T = Σ y xᵀ and S = Σ x xᵀ, with ρ 3 % of S's mean
    diagonal: the least-squares map from x to y, and close to W where the text says too little."""
    mean = own_II.double().diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped_target_OI = target_OI.double() + RIDGE * mean * weight_OI.double()
    return torch.linalg.solve(damped(own_II, RIDGE), damped_target_OI, left=False)
