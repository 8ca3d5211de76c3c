"""The optimiser of distillation, its learning-rate schedule, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ELEMENTS_AT_ONCE = 2**21
TINY_NORM = 1e-7
GRAM_ASPECT = 4
"""From this aspect on float32 on the Gram matrix beats bfloat16 on a CPU that has it."""
ADAM_RMS = 0.2
WARMUP_FRACTION = 0.05
FINAL_FRACTION = 0.05


class Muon(torch.optim.Optimizer):
    """Muon for matrices, Adam for everything else; no weight decay.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the Nesterov momentum of each
    matrix; the step size is Moonlight's (arXiv 2502.16982), which makes an update as large as
    Adam's. torch.optim.Muon computes in bfloat16 only, twenty times slower on CPUs without it; here
    ``dtype`` says (see ``orthogonalised``). ``orthogonalise=False`` is plain Adam for all
    parameters.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        *,
        orthogonalise: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "peak_lr": lr})
        self.orthogonalise, self.dtype = orthogonalise, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in moving if self.orthogonalise and p.ndim == 2]
            for alike in _batches_of_one_shape(matrices):
                _muon_step(alike, [self.state[p] for p in alike], group["lr"], self.dtype)
            for parameter in moving:
                if not (self.orthogonalise and parameter.ndim == 2):
                    _adam_step(parameter, self.state[parameter], group["lr"])
        return None


def _batches_of_one_shape(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices are orthogonalised many at once, as far as they fit a cache (or alone): most are too
    small for a second thread by themselves."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        at_once = max(1, ELEMENTS_AT_ONCE // max(1, shape.numel()))
        for start in range(0, len(alike), at_once):
            yield alike[start : start + at_once]


def _muon_step(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor]], lr: float, dtype: torch.dtype
) -> None:
    directions = []
    for parameter, state in zip(parameters, states, strict=True):
        assert parameter.grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        directions.append(parameter.grad.lerp(momentum, MOMENTUM))
    update_KMN = orthogonalised(torch.stack(directions), dtype).float()
    for parameter, update_MN in zip(parameters, update_KMN, strict=True):
        parameter.add_(update_MN, alpha=-lr * ADAM_RMS * max(parameter.shape) ** 0.5)


def _adam_step(parameter: Tensor, state: dict[str, Tensor], lr: float) -> None:
    assert parameter.grad is not None
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["mean"] = torch.zeros_like(parameter)
        state["square"] = torch.zeros_like(parameter)
    beta1, beta2 = ADAM_BETAS
    step = float(state["step"].add_(1))
    mean = state["mean"].lerp_(parameter.grad, 1 - beta1)
    square = state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(ADAM_EPSILON)
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def orthogonalised(matrices_KMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U Vᵀ of each matrix's SVD, by a quintic Newton-Schulz iteration in ``dtype``; in
    float32 where that is no slower, and then float32 comes back."""
    _, rows, columns = matrices_KMN.shape
    if rows > columns:
        return orthogonalised(matrices_KMN.mT, dtype).mT
    narrow = GRAM_ASPECT * rows <= columns and matrices_KMN.device.type == "cpu"
    if dtype == torch.float32 or narrow:
        return _iterated_on_gram(matrices_KMN.float())
    norm_K11 = torch.linalg.matrix_norm(matrices_KMN, keepdim=True).clamp_min(TINY_NORM)
    return _iterated((matrices_KMN / norm_K11).to(dtype))


def _iterated(x_KMN: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_KMM = x_KMN @ x_KMN.mT
        factor_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, factor_KMM, x_KMN, beta=a)
    return x_KMN


def _iterated_on_gram(x_KMN: Tensor) -> Tensor:
    """The same at half the cost or less: every iterate is a polynomial in the Gram matrix times the
    matrix itself, so the iteration runs on the smaller side only and meets the long one twice.
    Rounding grows 10⁴-fold on the way, which float32 can bear and bfloat16 cannot."""
    gram_KMM = x_KMN @ x_KMN.mT
    norm_K11 = gram_KMM.diagonal(dim1=1, dim2=2).sum(-1).sqrt().clamp_min(TINY_NORM)[:, None, None]
    gram_KMM /= norm_K11.square()
    factor_KMM = product_KMM = _factor(gram_KMM)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram_KMM = factor_KMM @ gram_KMM @ factor_KMM
        factor_KMM = _factor(gram_KMM)
        product_KMM = factor_KMM @ product_KMM
    return (product_KMM / norm_K11) @ x_KMN


def _factor(gram_KMM: Tensor) -> Tensor:
    """a·I + b·G + c·G²: what one step multiplies its matrices by."""
    a, b, c = NEWTON_SCHULZ
    factor_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
    factor_KMM.diagonal(dim1=1, dim2=2).add_(a)
    return factor_KMM


def make_optimizer(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    allocation_rate: float,
    dtype: torch.dtype = torch.float32,
) -> Muon:
    """``name`` is "muon" or "adamw"; d and g learn at ``allocation_rate``."""
    groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learns_allocation = parameter_name.endswith((".retention", ".gate_R"))
            rate = allocation_rate if learns_allocation else learning_rate
            groups.setdefault(rate, []).append(parameter)
    lists = [{"params": params, "peak_lr": rate} for rate, params in groups.items()]
    return Muon(lists, learning_rate, orthogonalise=name == "muon", dtype=dtype)


def cosine_scale(step: int, steps: int) -> float:
    """Learning-rate factor of ``step`` (0-based) of ``steps``: linear warm-up, cosine to 5 %."""
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_FRACTION * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimiser's state keyed ``parameter|field``, ready for safetensors."""
    return {
        f"{name}|{field}": value.contiguous()
        for name, parameter in names
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Iterable[tuple[str, nn.Parameter]],
    tensors: dict[str, Tensor],
) -> None:
    """Inverse of ``optimizer_tensors``. Raises KeyError on a parameter that is not there."""
    by_name = dict(names)
    for key, value in tensors.items():
        name, field = key.split("|")
        optimizer.state[by_name[name]][field] = value
