"""From a plan to a student that trains, and from a trained student to merged weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.factors import FactorStore
from distill.lowrank import break_even_rank
from distill.plan import NEURON_READER, Decision, Plan
from distill.sharding import whole
from distill.student import (
    BudgetedLinear,
    budgeted_modules,
    dense_linear,
    narrowed_module,
    replace_module,
    residual,
    structured_module,
)


def build_structure(
    model: PreTrainedModel,
    plan: Plan,
    store: FactorStore | None,
    *,
    lora_rank: int,
    anneal: bool,
    weights: PreTrainedModel | None = None,
) -> None:
    """Replace every target module by the training form of its decision, in place.

    ``store`` is None where the plan keeps every module; ``weights`` is the model whose outline
    ``model`` is, if it is one.
    """
    model.requires_grad_(False)
    for index, decision in enumerate(plan.decisions):
        linear = model.get_submodule(decision.module)
        assert isinstance(linear, nn.Linear)
        if weights is not None:
            source = weights.get_submodule(decision.module)
            assert isinstance(source, nn.Linear)
            linear.weight = nn.Parameter(whole(source.weight), requires_grad=False)
        if decision.action == "narrow":
            assert store is not None
            module: nn.Module = _narrowed(linear, decision, store, lora_rank, seed=index)
        else:
            needed = decision.action == "approximate" or (decision.action == "remove" and anneal)
            factors = store.load(decision.module) if needed and store is not None else None
            module = structured_module(
                linear, factors, decision, lora_rank=lora_rank, anneal=anneal, seed=index
            )
        replace_module(model, decision.module, module)
    train_norms(model)


def _narrowed(
    linear: nn.Linear, decision: Decision, store: FactorStore, lora_rank: int, seed: int
) -> nn.Module:
    block, _, leaf = decision.module.rpartition(".")
    kept_K = store.neuron_order(block)[: decision.rank]
    moment_MM = store.neuron_moment(block) if leaf == NEURON_READER else None
    return narrowed_module(linear, kept_K, moment_MM, lora_rank=lora_rank, seed=seed)


def build_learned(model: PreTrainedModel, store: FactorStore, prior: Plan | None) -> None:
    """Every module with its frozen residual, learned d and learned gates up to the rank beyond
    which dense is cheaper. ``prior`` starts d and g where a plan has cut at one half instead of 1.
    """
    model.requires_grad_(False)
    decisions: dict[str, Decision] = {d.module: d for d in prior.decisions} if prior else {}
    for shape in store.modules:
        linear = model.get_submodule(shape.name)
        assert isinstance(linear, nn.Linear)
        rank = break_even_rank(shape.out_features, shape.in_features)
        factors = store.load(shape.name)
        up_OR, down_RI = (part.to(linear.weight.device) for part in factors.truncated(rank))
        residual_OI = residual(linear.weight.detach(), up_OR, down_RI)
        bias = None if linear.bias is None else linear.bias.detach()
        module = BudgetedLinear(residual_OI, up_OR, down_RI, bias, learned=True)
        decision = decisions.get(shape.name)
        if decision is not None and decision.action != "keep":
            with torch.no_grad():
                module.retention.fill_(0.5)
                module.gate_R[decision.rank :] = 0.5
        replace_module(model, shape.name, module)
    train_norms(model)


def train_norms(model: nn.Module) -> None:
    """Let every norm's weight learn, in float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            assert isinstance(module.weight, nn.Parameter)
            module.weight = nn.Parameter(module.weight.detach().float())


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Every BudgetedLinear as one dense Linear of its effective weight, in place."""
    for name, module in budgeted_modules(model).items():
        dtype = module.up.dtype if module.dense_OI is None else module.dense_OI.dtype
        replace_module(model, name, dense_linear(module.effective_weight(), module.bias, dtype))
    return model.requires_grad_(False)
