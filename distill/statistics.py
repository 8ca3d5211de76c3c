"""Second moments of each target module's inputs and output gradients, gathered by layer groups.

S = E[x xᵀ] over the module's inputs; G = E[g gᵀ] over the gradients, at its outputs, of the model's
own log-likelihood (targets sampled from the model: the true Fisher, not the empirical one).

Shape legend: B batch, T tokens, D hidden, O out_features, I in_features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.data import TokenSet

VOCABULARY_CHUNK = 256


@dataclass(frozen=True)
class Moments:
    """S and G of one module, float32, divided by the number of tokens seen."""

    input_II: Tensor
    gradient_OO: Tensor


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.model.layers


def layer_groups(
    layers: nn.ModuleList, memory_bytes: int, unmeasured: tuple[str, ...] = ()
) -> list[range]:
    """Consecutive layers whose moments fit ``memory_bytes`` together; at least one a group."""
    groups: list[range] = []
    start, used = 0, 0
    for index, layer in enumerate(layers):
        need = moment_bytes(layer, unmeasured)
        if index > start and used + need > memory_bytes:
            groups.append(range(start, index))
            start, used = index, 0
        used += need
    return [*groups, range(start, len(layers))]


def moment_bytes(layer: nn.Module, unmeasured: tuple[str, ...] = ()) -> int:
    """Bytes of S and G of one decoder layer in float32, S counted once per distinct input."""
    linears = dict(_measured_linears(layer, unmeasured))
    inputs = {input_key(n): m.in_features**2 for n, m in linears.items()}
    return 4 * (sum(inputs.values()) + sum(m.out_features**2 for m in linears.values()))


def _measured_linears(
    layer: nn.Module, unmeasured: tuple[str, ...]
) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(unmeasured):
            yield name, module


def input_key(name: str) -> str:
    """Modules that read the same tensor share one S: q, k, v and gate, up."""
    parent, _, leaf = name.rpartition(".")
    shared = {
        "q_proj": "qkv",
        "k_proj": "qkv",
        "v_proj": "qkv",
        "gate_proj": "mlp",
        "up_proj": "mlp",
    }
    return f"{parent}.{shared.get(leaf, leaf)}"


def gather_moments(
    model: PreTrainedModel,
    data: TokenSet,
    layers: range,
    *,
    batch_size: int,
    seed: int,
    answer_weight: float,
    unmeasured: tuple[str, ...] = (),
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Moments]:
    """One pass over ``data`` for the target modules of ``layers``, but those whose names end in one
    of ``unmeasured``.

    Layers before the group run without a graph; the parameters are frozen and receive no gradients.
    Positions whose next token is a few-shot answer count ``answer_weight`` times in the sampled
    log-likelihood.
    """
    model.requires_grad_(False)
    sums_S: dict[str, Tensor] = {}
    sums_G: dict[str, Tensor] = {}
    generator = torch.Generator(model.device).manual_seed(seed)
    weights_NT = token_weights(data.answer_NT, answer_weight).to(model.device)
    tokens = 0
    with _moment_hooks(model, layers, unmeasured, sums_S, sums_G):
        for start in range(0, len(data.ids_NT), batch_size):
            rows = slice(start, start + batch_size)
            ids_BT = torch.from_numpy(data.ids_NT[rows].astype(np.int64)).to(model.device)
            hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            gradient = sampled_gradient(
                hidden_BTD.detach(), model.get_output_embeddings(), weights_NT[rows], generator
            )
            hidden_BTD.backward(gradient)
            tokens += ids_BT.numel()
            advance(ids_BT.numel())
    names = [n for n, _ in model.named_modules() if n in sums_G]
    return {n: Moments(sums_S[input_key(n)] / tokens, sums_G[n] / tokens) for n in names}


def token_weights(answer_NT: np.ndarray, answer_weight: float) -> Tensor:
    """Per-position loss weights with mean 1: ``answer_weight`` at answers, 1 elsewhere."""
    weights_NT = torch.where(torch.from_numpy(answer_NT), answer_weight, 1.0)
    return weights_NT / weights_NT.mean()


def sampled_gradient(
    hidden_BTD: Tensor, head: nn.Linear, weights_BT: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of −Σ √w·log p(sampled target) with respect to the final hidden states (B, T, D):
    its outer products then carry the weight w.

    At most ``VOCABULARY_CHUNK`` rows of logits exist at a time.
    """
    flat_ND = hidden_BTD.flatten(0, 1)
    gradient_ND = torch.empty_like(flat_ND)
    weight_VD = head.weight.detach()
    for start in range(0, len(flat_ND), VOCABULARY_CHUNK):
        rows = slice(start, start + VOCABULARY_CHUNK)
        probability_CV = torch.softmax((flat_ND[rows] @ weight_VD.T).float(), dim=-1)
        target_C1 = torch.multinomial(probability_CV, 1, generator=generator)
        probability_CV.scatter_add_(1, target_C1, -torch.ones_like(probability_CV[:, :1]))
        probability_CV *= weights_BT.flatten()[rows, None].sqrt()
        gradient_ND[rows] = probability_CV.to(weight_VD.dtype) @ weight_VD
    return gradient_ND.view_as(hidden_BTD)


@contextmanager
def _moment_hooks(
    model: PreTrainedModel,
    layers: range,
    unmeasured: tuple[str, ...],
    sums_S: dict[str, Tensor],
    sums_G: dict[str, Tensor],
) -> Iterator[None]:
    handles = []
    blocks = decoder_layers(model)
    handles.append(blocks[layers.start].register_forward_pre_hook(_start_graph, with_kwargs=True))
    for index in layers:
        for leaf, linear in _measured_linears(blocks[index], unmeasured):
            name = f"model.layers.{index}.{leaf}"
            handles.append(linear.register_forward_hook(_accumulator(name, sums_S, sums_G)))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _start_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs


def _accumulator(name: str, sums_S: dict[str, Tensor], sums_G: dict[str, Tensor]) -> Callable:
    key = input_key(name)
    owns_input = not name.endswith(("k_proj", "v_proj", "up_proj"))

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if owns_input:
            x = args[0].detach()
            add_outer(sums_S, key, x, x)
        output.register_hook(lambda g: add_outer(sums_G, name, g.detach(), g.detach()))

    return hook


def add_outer(sums: dict[str, Tensor], key: str, x: Tensor, y: Tensor) -> None:
    """Add Σ x yᵀ over all positions of x (..., I) and y (..., J) to ``sums[key]`` (I, J)."""
    x_NI, y_NJ = x.flatten(0, -2).float(), y.flatten(0, -2).float()
    if key in sums:
        sums[key].addmm_(x_NI.T, y_NJ)
    else:
        sums[key] = x_NI.T @ y_NJ
