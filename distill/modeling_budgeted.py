"""Model classes of a budgeted student: a causal LM with factored, narrowed and removed Linears.

This file needs torch and transformers (>= 4.57, < 6) alone. It is copied verbatim into every
student directory, where ``trust_remote_code=True`` loads it without the package that wrote it.
Importing it from anywhere else registers the classes with AutoConfig and AutoModelForCausalLM.

Shapes: B batch, S sequence, D in_features, E out_features, R rank.
A module ``...q_proj`` is stored as ``q_proj.weight`` (kept, ED), as ``q_proj.down.weight`` (RD)
with ``q_proj.up.weight`` (ER) and ``q_proj.up.bias`` (E) (approximated), or as ``q_proj.bias``
at most (removed). The three projections of an MLP that the config's ``widths`` names are plain
Linears of that many neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Of an MLP; the last one reads its neurons, the others write them."""


class FactoredLinear(nn.Module):
    """``up(down(x))``: x_BSD -> B,S,R -> B,S,E, with the bias on ``up``; R·(D + E) MACs a token."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_BSD))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class RemovedLinear(nn.Module):
    """What is left of a removed Linear: zeros of shape B,S,E plus the bias, if there was one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None
        bias_E = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", bias_E if bias else None)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        y_BSE = x_BSD.new_zeros(*x_BSD.shape[:-1], self.out_features)
        return y_BSE if self.bias is None else y_BSE + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def apply_structure(
    model: nn.Module, ranks: Mapping[str, int], widths: Mapping[str, int] | None = None
) -> None:
    """Replace the named Linears of ``model`` in place: rank 0 removes, a rank above 0 factors.

    ``widths``: the neurons of every MLP that is narrowed, by its name; its three projections become
    smaller Linears. A module that neither names stays dense. New weights, and the biases of
    narrowed Linears, hold torch's default initialisation, other biases a copy of the old ones;
    device and dtype follow the Linear that is replaced.

    Raises:
        ValueError: a name that is no ``nn.Linear`` or no MLP of ``model``, a rank that is no
            integer >= 0, or a width that is not below the MLP's own.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, rank in ranks.items():
        if name not in linears:
            raise ValueError(f"ranks names {name!r}, which is no Linear of {type(model).__name__}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank of {name} is {rank!r}; it must be an integer >= 0")
    for name, width in (widths or {}).items():
        members = [f"{name}.{leaf}" for leaf in PROJECTIONS]
        if not linears.keys() >= set(members) or ranks.keys() & set(members):
            raise ValueError(f"widths names {name!r}, which is no MLP of three dense projections")
        neurons = linears[members[-1]].in_features
        if isinstance(width, bool) or not isinstance(width, int) or not 0 < width < neurons:
            raise ValueError(
                f"width of {name} is {width!r}; it must be at least 1 and below {neurons}"
            )
    for name, rank in ranks.items():
        _put(model, name, _replacement(linears[name], rank))
    for name, width in (widths or {}).items():
        for leaf in PROJECTIONS:
            linear = linears[f"{name}.{leaf}"]
            _put(model, f"{name}.{leaf}", _narrowed(linear, width, leaf == PROJECTIONS[-1]))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _narrowed(linear: nn.Linear, width: int, reads: bool) -> nn.Linear:
    """A new Linear in the place of ``linear`` that reads or writes ``width`` neurons."""
    sizes = (width, linear.out_features) if reads else (linear.in_features, width)
    weight, has_bias = linear.weight, linear.bias is not None
    new = nn.Linear(*sizes, bias=has_bias, device=weight.device, dtype=weight.dtype)
    return new.train(linear.training)


def _replacement(linear: nn.Linear, rank: int) -> nn.Module:
    """The structure that stands for ``linear`` at ``rank``, with its bias, device and dtype."""
    bias = linear.bias
    place: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    sizes = linear.in_features, linear.out_features
    new: FactoredLinear | RemovedLinear
    if rank == 0:
        new = RemovedLinear(*sizes, bias=bias is not None, **place)
    else:
        new = FactoredLinear(*sizes, rank, bias=bias is not None, **place)
    new_bias = new.up.bias if isinstance(new, FactoredLinear) else new.bias
    if bias is not None and new_bias is not None and not bias.is_meta:
        with torch.no_grad():
            new_bias.copy_(bias)
    return new.train(linear.training)


def _init_of(plain: Any) -> Any:
    """The ``__init__`` of the budgeted config of a family, with two fields more than its own.

    ``ranks``: module name -> rank (0: removed; absent: dense). ``widths``: name of an MLP -> its
    neurons (absent: all). transformers 5 makes an ``__init__`` for every config class that does not
    bring one itself, so that a common base could not.
    """

    def __init__(
        self: Any,
        ranks: dict[str, int] | None = None,
        widths: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["base_model_type"] = plain.model_type
        plain.__init__(self, **kwargs)
        self.ranks, self.widths = dict(ranks or {}), dict(widths or {})

    return __init__


class BudgetedLlamaConfig(LlamaConfig):
    model_type = "budgeted_llama"
    base_model_tp_plan = {}
    __init__ = _init_of(LlamaConfig)


class BudgetedMistralConfig(MistralConfig):
    model_type = "budgeted_mistral"
    base_model_tp_plan = {}
    __init__ = _init_of(MistralConfig)


class BudgetedQwen2Config(Qwen2Config):
    model_type = "budgeted_qwen2"
    base_model_tp_plan = {}
    __init__ = _init_of(Qwen2Config)


class BudgetedQwen3Config(Qwen3Config):
    model_type = "budgeted_qwen3"
    base_model_tp_plan = {}
    __init__ = _init_of(Qwen3Config)


class BudgetedGemma3TextConfig(Gemma3TextConfig):
    model_type = "budgeted_gemma3_text"
    base_model_tp_plan = {}
    __init__ = _init_of(Gemma3TextConfig)


class BudgetedLlamaForCausalLM(LlamaForCausalLM):
    config_class = BudgetedLlamaConfig

    def __init__(self, config: BudgetedLlamaConfig) -> None:
        super().__init__(config)
        apply_structure(self, config.ranks, config.widths)


class BudgetedMistralForCausalLM(MistralForCausalLM):
    config_class = BudgetedMistralConfig

    def __init__(self, config: BudgetedMistralConfig) -> None:
        super().__init__(config)
        apply_structure(self, config.ranks, config.widths)


class BudgetedQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = BudgetedQwen2Config

    def __init__(self, config: BudgetedQwen2Config) -> None:
        super().__init__(config)
        apply_structure(self, config.ranks, config.widths)


class BudgetedQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = BudgetedQwen3Config

    def __init__(self, config: BudgetedQwen3Config) -> None:
        super().__init__(config)
        apply_structure(self, config.ranks, config.widths)


class BudgetedGemma3ForCausalLM(Gemma3ForCausalLM):
    config_class = BudgetedGemma3TextConfig

    def __init__(self, config: BudgetedGemma3TextConfig) -> None:
        super().__init__(config)
        apply_structure(self, config.ranks, config.widths)


MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    LlamaConfig.model_type: BudgetedLlamaForCausalLM,
    MistralConfig.model_type: BudgetedMistralForCausalLM,
    Qwen2Config.model_type: BudgetedQwen2ForCausalLM,
    Qwen3Config.model_type: BudgetedQwen3ForCausalLM,
    Gemma3TextConfig.model_type: BudgetedGemma3ForCausalLM,
}
"""model_type of the plain architecture -> class of its budgeted student."""

for _model_class in MODEL_CLASSES.values():
    _config_class: Any = _model_class.config_class
    _config_class.register_for_auto_class()
    _model_class.register_for_auto_class("AutoModelForCausalLM")
    if not __name__.startswith("transformers_modules."):
        AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
        AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)
