"""Two-sided SVD of a Linear weight: the low-rank path that costs the loss least.

For a weight ``W_OI``, inputs with second moment ``S_II = E[x xᵀ]`` and output gradients with second
moment ``G_OO = E[g gᵀ]``, replacing W by W' changes the loss, to second order and with independent
x and g, by about ``½ ‖chol(G)ᵀ (W − W') chol(S)‖²``. The best W' of rank r is the truncated SVD of
that product, mapped back. SVD-LLM (arXiv 2403.12983) whitens the input side only; the output side
is the Kronecker-factored Fisher of K-FAC (arXiv 1503.05671).

Shape legend: O out_features, I in_features, K = min(O, I), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INPUT_DAMPING = 1e-3
GRADIENT_DAMPING = 1e-2


@dataclass(frozen=True)
class Factors:
    """All rank-one terms of one weight, the most important first.

    ``up_OK[:, :r] @ down_KI[:r]`` is the best rank-r weight; ``energy_K`` (float64, descending)
    holds the loss each term is worth, so ``energy_K[r:].sum()`` estimates the loss of stopping
    at rank r.
    """

    up_OK: Tensor
    down_KI: Tensor
    energy_K: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """``(up_OR, down_RI)`` in float32 with equal norms on both sides of every rank-one term."""
        return balanced(self.up_OK[:, :rank].float(), self.down_KI[:rank].float())


def damped(moment_NN: Tensor, damping: float) -> Tensor:
    """The moment in float64 plus ``damping`` times its mean diagonal; positive definite."""
    moment = moment_NN.to(torch.float64, copy=True)
    mean = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(damping * mean)
    return moment


def two_sided_svd(
    weight_OI: Tensor, input_moment_II: Tensor | None, gradient_moment_OO: Tensor | None
) -> Factors:
    """Factor ``weight_OI`` in the metrics of its inputs and output gradients.

    A moment of None stands for the identity: plain SVD with two, SVD-LLM's whitening with only
    G None.
    Works through the eigenvectors of the smaller Gram matrix in float64, so the cost is one
    min(O, I)³ eigenproblem and the product of all terms equals ``weight_OI`` to float32 accuracy.
    """
    weight = weight_OI.double()
    out_features, in_features = weight.shape
    S = _metric(input_moment_II, weight.T, INPUT_DAMPING)
    G = _metric(gradient_moment_OO, weight, GRADIENT_DAMPING)
    if out_features <= in_features:
        root = torch.linalg.cholesky(G)
        half_OI = root.T @ weight
        energy, vectors = torch.linalg.eigh(half_OI @ S @ half_OI.T)
        vectors = vectors.flip(1)
        up = torch.linalg.solve_triangular(root.T, vectors, upper=True)
        down = vectors.T @ half_OI
    else:
        root = torch.linalg.cholesky(S)
        half_OI = weight @ root
        energy, vectors = torch.linalg.eigh(half_OI.T @ G @ half_OI)
        vectors = vectors.flip(1)
        up = half_OI @ vectors
        down = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
    return Factors(up.float(), down.float(), energy.flip(0).clamp_min(0))


def metric_root(gradient_moment_OO: Tensor) -> Tensor:
    """Lower Cholesky factor of the damped G in bfloat16: half the bytes, and its square stays
    positive definite whatever rounding does."""
    return (
        torch.linalg.cholesky(damped(gradient_moment_OO, GRADIENT_DAMPING)).bfloat16().contiguous()
    )


def balanced(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale each rank-one term so that both of its vectors have the same norm."""
    tiny = torch.finfo(torch.float32).tiny
    down_R, up_R = (
        side.double().norm(dim=dim).clamp_min(tiny) for side, dim in ((down_RI, 1), (up_OR, 0))
    )
    ratio_R = (down_R / up_R).sqrt().to(up_OR.dtype)
    return up_OR * ratio_R, down_RI / ratio_R[:, None]


def break_even_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factored pair costs fewer MACs than the dense matmul."""
    return (out_features * in_features - 1) // (out_features + in_features)


def _metric(moment_NN: Tensor | None, like_NM: Tensor, damping: float) -> Tensor:
    if moment_NN is None:
        return torch.eye(len(like_NM)).to(like_NM)
    return damped(moment_NN, damping)
