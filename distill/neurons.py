"""Which neurons of an MLP stay when it is narrowed, and what those that go leave to them.

An MLP computes W h with h = act(gate x) ⊙ up x. Without some of its neurons, W C[:, J] C[J, J]⁻¹ is
the best matrix for those that stay (J), C = E[h hᵀ] being known: it adds to their columns what they
predict of the others (a Nyström approximation; for MLPs: MoDeGPT, arXiv 2408.09632). In the metric
of the output gradients G the loss then grows by ½ tr(G W (C − C[:, J] C[J, J]⁻¹ C[J, :]) Wᵀ).
Which ones go is decided greedily, by the least growth next: Optimal Brain Surgeon (Hassibi and
Stork 1993) on columns, as in ZipLM (arXiv 2302.04089).

gate and up lose rows only, and everything that stays is full-rank: where a factored pair blurs the
few directions that tell one token from another, this leaves them as they are.

Shape legend: M neurons, O out_features, K neurons that stay, N neurons not yet gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.lowrank import GRADIENT_DAMPING, INPUT_DAMPING, damped

ROUNDS = 96


@dataclass(frozen=True)
class NeuronRanking:
    """``order_M``: neurons, the last to go first. ``energy_M`` (float64): what each is worth in
    that order, so that half of ``energy_M[k:].sum()`` estimates the loss of keeping the first k.
    """

    order_M: Tensor
    energy_M: Tensor


def rank_neurons(weight_OM: Tensor, moment_MM: Tensor, gradient_OO: Tensor) -> NeuronRanking:
    """Order the neurons that ``weight_OM`` (down_proj) reads by when they would go.

    ``moment_MM`` is E[h hᵀ], ``gradient_OO`` E[g gᵀ] at the output. One round takes away the
    least of what is left, a ninety-sixth of all neurons together; energies within a round are
    equal. Work in float64: about M³ + M²·O multiply-accumulates.
    """
    left_N = torch.arange(weight_OM.shape[1], device=weight_OM.device)
    inverse_NN = torch.linalg.inv(damped(moment_MM, INPUT_DAMPING))
    half_ON = torch.linalg.cholesky(damped(gradient_OO, GRADIENT_DAMPING)).T @ weight_OM.double()
    at_once = max(1, len(left_N) // ROUNDS)
    gone, energies = [], []
    while len(left_N):
        growth_N = half_ON.square().sum(0) / inverse_NN.diagonal()
        going = growth_N.topk(min(at_once, len(left_N)), largest=False, sorted=True).indices
        columns = inverse_NN[:, going]
        block = torch.linalg.inv(columns[going])
        lost_O = half_ON[:, going]
        energy = (lost_O @ block * lost_O).sum() / len(going)
        energies.append(energy.expand(len(going)))
        gone.append(left_N[going])
        half_ON.addmm_(lost_O @ block, columns.T, alpha=-1)
        inverse_NN.addmm_(columns @ block, columns.T, alpha=-1)
        stays_N = torch.ones(len(left_N), dtype=torch.bool, device=left_N.device)
        stays_N[going] = False
        left_N, half_ON = left_N[stays_N], half_ON[:, stays_N]
        inverse_NN = inverse_NN[stays_N][:, stays_N]
    return NeuronRanking(torch.cat(gone).flip(0), torch.cat(energies).flip(0).clamp_min(0))


def narrowed_reader(weight_OM: Tensor, moment_MM: Tensor, kept_K: Tensor) -> Tensor:
    """The columns of ``weight_OM`` that stay, with what they predict of the others: float32
    (O, K)."""
    moment = damped(moment_MM, INPUT_DAMPING)
    between_KO = moment[kept_K] @ weight_OM.double().T
    return torch.linalg.solve(moment[kept_K][:, kept_K], between_KO).T.float()
