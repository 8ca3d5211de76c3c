"""The budgeted student while it trains, and its merge into plain Linear weights.

y = d·R x + B·diag(g)·A x + bias. R is what the low-rank path does not cover of the dense weight
(R = W − B₀A₀, frozen), d ∈ [0, 1] the dense retention, g ∈ [0, 1] the rank gates: at d = g = 1 the
module is the dense original, at d = 0 the best low-rank network. A kept or narrowed module has its
whole weight frozen as R, and B·A is an adapter that begins at zero.

Shape legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.lowrank import Factors
from distill.modeling_budgeted import FactoredLinear, RemovedLinear
from distill.neurons import narrowed_reader
from distill.plan import Decision, Plan


class BudgetedLinear(nn.Module):
    """One target module in training.

    ``dense_OI`` is the frozen residual (None once the dense path is gone). ``retention`` d is a
    scalar buffer that the schedule sets where the dense path ``fades``, or, when ``learned``, a
    parameter; ``gate_R`` g likewise. Else both stay 1, and are not multiplied by.
    """

    def __init__(
        self,
        dense_OI: Tensor | None,
        up_OR: Tensor,
        down_RI: Tensor,
        bias: Tensor | None,
        *,
        learned: bool = False,
        fades: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = up_OR.shape[0], down_RI.shape[1]
        self.dense_macs = self.out_features * self.in_features
        self.rank_macs = self.out_features + self.in_features
        self.up = nn.Parameter(up_OR.contiguous())
        self.down = nn.Parameter(down_RI.contiguous())
        self.dense_OI: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("dense_OI", dense_OI, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.learned, self.fades = learned, fades
        self.retention: Tensor
        self.gate_R: Tensor
        _hold(self, "retention", torch.ones(()), learned)
        _hold(self, "gate_R", torch.ones(up_OR.shape[1]), learned)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down.to(x.dtype))
        if self.dense_OI is not None and not (self.learned or self.fades):
            y = F.linear(x, self.dense_OI, self.bias)
            added = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), self.up.to(x.dtype).T)
            return added.view_as(y)
        if self.learned:
            hidden = hidden * self.gate_R.to(x.dtype)
        y = F.linear(hidden, self.up.to(x.dtype), self.bias)
        if self.dense_OI is not None:
            y = y + self.retention.to(x.dtype) * F.linear(x, self.dense_OI)
        return y

    def gated_up(self) -> Tensor:
        """B·diag(g), shape (O, R)."""
        return self.up * self.gate_R

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W_e = d·R + B·diag(g)·A in float32, shape (O, I)."""
        low_rank = self.gated_up().float() @ self.down.float()
        if self.dense_OI is None:
            return low_rank
        return low_rank + self.retention.float() * self.dense_OI.float()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Project learned d and g back onto [0, 1]."""
        if self.learned:
            self.retention.clamp_(0, 1)
            self.gate_R.clamp_(0, 1)


def _hold(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value, persistent=False)


def budgeted_modules(model: nn.Module) -> dict[str, BudgetedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BudgetedLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``name``, on that one's device."""
    parent, _, leaf = name.rpartition(".")
    device = next(model.get_submodule(name).parameters()).device
    setattr(model.get_submodule(parent), leaf, module.to(device))


def structured_module(
    linear: nn.Linear,
    factors: Factors | None,
    decision: Decision,
    *,
    lora_rank: int,
    anneal: bool,
    seed: int,
) -> nn.Module:
    """The training form of one decision.

    Keep: the frozen weight with a LoRA adapter of ``lora_rank``. Approximate: the factored pair,
    with the frozen rest of the dense weight beside it when ``anneal``. Remove: nothing, or the
    frozen dense weight that will fade when ``anneal``.
    """
    weight_OI = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if decision.action == "keep":
        up_OR, down_RI = lora_init(weight_OI, lora_rank, seed)
        return BudgetedLinear(weight_OI, up_OR, down_RI, bias)
    if decision.action == "remove" and not anneal:
        return removed_module(linear)
    assert factors is not None
    up_OR, down_RI = (part.to(weight_OI.device) for part in factors.truncated(decision.rank))
    residual_OI = residual(weight_OI, up_OR, down_RI) if anneal else None
    return BudgetedLinear(residual_OI, up_OR, down_RI, bias, fades=anneal)


def narrowed_module(
    linear: nn.Linear,
    kept_K: Tensor,
    moment_MM: Tensor | None,
    *,
    lora_rank: int,
    seed: int,
) -> BudgetedLinear:
    """The training form of one projection of a narrowed MLP: the neurons ``kept_K`` of its weight,
    frozen, with a LoRA adapter. ``moment_MM`` is what down_proj needs to make up for the others;
    the projections that write neurons have none.
    """
    weight_OI = linear.weight.detach()
    bias_O = None if linear.bias is None else linear.bias.detach()
    kept_K = kept_K.to(weight_OI.device)
    if moment_MM is None:
        narrow_OI = weight_OI[kept_K]
        bias_O = None if bias_O is None else bias_O[kept_K]
    else:
        narrow_OI = narrowed_reader(weight_OI, moment_MM.to(weight_OI.device), kept_K)
        narrow_OI = narrow_OI.to(weight_OI.dtype)
    up_OR, down_RI = lora_init(narrow_OI, lora_rank, seed)
    return BudgetedLinear(narrow_OI, up_OR, down_RI, bias_O)


def residual(weight_OI: Tensor, up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """W − BA, what the low-rank path leaves of a weight, in that one's precision."""
    return (weight_OI.float() - up_OR @ down_RI).to(weight_OI.dtype)


def removed_module(linear: nn.Linear) -> RemovedLinear:
    removed = RemovedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    with torch.no_grad():
        _copy_bias(linear.bias, removed.bias)
    return removed.requires_grad_(False)


def lora_init(weight_OI: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Zero up and Kaiming-uniform down, as in LoRA (arXiv 2106.09685)."""
    out_features, in_features = weight_OI.shape
    rank = min(rank, out_features, in_features)
    generator = torch.Generator().manual_seed(seed)
    down_RI = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * in_features**-0.5
    return torch.zeros(out_features, rank), down_RI


@torch.no_grad()
def merge(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every BudgetedLinear by what its decision says: Linear, FactoredLinear or
    RemovedLinear, in ``dtype``. No adapter is left."""
    modules = budgeted_modules(model)
    for decision in plan.decisions:
        if decision.module in modules:
            merged = _merged(modules[decision.module], decision)
            replace_module(model, decision.module, merged)
    model.to(dtype)  # type: ignore[arg-type]
    return model


def _merged(module: BudgetedLinear, decision: Decision) -> nn.Module:
    if decision.action in ("keep", "narrow"):
        return dense_linear(module.effective_weight(), module.bias, torch.float32)
    sizes = (module.in_features, module.out_features)
    has_bias = module.bias is not None
    if decision.action == "remove":
        removed = RemovedLinear(*sizes, has_bias)
        _copy_bias(module.bias, removed.bias)
        return removed
    factored = FactoredLinear(*sizes, decision.rank, has_bias)
    factored.up.weight.copy_(module.gated_up())
    factored.down.weight.copy_(module.down)
    _copy_bias(module.bias, factored.up.bias)
    return factored


def _copy_bias(source: Tensor | None, target: Tensor | None) -> None:
    if source is not None and target is not None:
        target.copy_(source)


def dense_linear(weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias is not None, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight_OI)
        _copy_bias(bias, linear.bias)
    return linear
