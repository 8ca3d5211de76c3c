"""Merged pairs of an MLP as interpolative decompositions: exact, and cheaper at the same rank.

A matrix W of rank R equals its skeleton, R of its own rows, and a matrix X that interpolates the
others from these: R·(O + I − R) MACs instead of R·(O + I). Column-pivoted QR finds rows that keep X
small (Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of low rank matrices", 2005;
scipy's LAPACK does it). The neurons of an MLP may stand in any order, so that the skeletons of its
three projections are made contiguous, and no gather is left in the student.

Shape legend: M neurons, O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from distill.modeling_budgeted import FactoredLinear, SkeletonLinear
from distill.plan import NEURON_READER, NEURON_WRITERS, Plan

PROJECTIONS = (NEURON_READER, *NEURON_WRITERS)


@torch.no_grad()
def interpolate(
    model: nn.Module, plan: Plan, advance: Callable[[int], None] = lambda mlps: None
) -> None:
    """Give every MLP of the merged ``model`` the form that an interpolative ``plan`` says, in
    place: same function, neurons in another order. Pairs must be in float32."""
    blocks = {name.rpartition(".")[0] for name in plan.skeletons}
    for block in sorted(blocks):
        mlp = model.get_submodule(block)
        starts = {
            kind: plan.skeletons[f"{block}.{kind}"]
            for kind in PROJECTIONS
            if f"{block}.{kind}" in plan.skeletons
        }
        order_M = _order(mlp, starts)
        for kind in PROJECTIONS:
            linear = mlp.get_submodule(kind)
            _reorder(linear, order_M, reads=kind == NEURON_READER)
            if kind in starts:
                assert isinstance(linear, FactoredLinear)
                setattr(mlp, kind, _interpolative(linear, starts[kind], kind == NEURON_READER))
        advance(1)


def _order(mlp: nn.Module, starts: Mapping[str, int]) -> Tensor:
    """The neurons by their new place (M,): each skeleton where the plan wants it."""
    reader = mlp.get_submodule(NEURON_READER)
    assert isinstance(reader.in_features, int)
    order_M = np.full(reader.in_features, -1)
    free = np.arange(reader.in_features)
    for kind, start in starts.items():
        pair = mlp.get_submodule(kind)
        assert isinstance(pair, FactoredLinear)
        chosen = free[_skeleton(_neuron_rows(pair, kind == NEURON_READER)[free])]
        order_M[start : start + pair.rank] = chosen
        free = np.setdiff1d(free, chosen, assume_unique=True)
    order_M[order_M < 0] = free
    return torch.from_numpy(order_M)


def _neuron_rows(pair: FactoredLinear, reads: bool) -> np.ndarray:
    """What the pair's matrix has for each neuron, in coordinates that keep lengths and angles:
    float64 (M, R)."""
    up_OR, down_RI = pair.up.weight.double().cpu(), pair.down.weight.double().cpu()
    neurons_MR, other_RN = (down_RI.T, up_OR.T) if reads else (up_OR, down_RI)
    triangle_RR = torch.linalg.qr(other_RN.T, mode="r").R
    return (neurons_MR @ triangle_RR.T).numpy()


def _skeleton(rows_MR: np.ndarray) -> np.ndarray:
    """R row numbers whose rows interpolate the others well."""
    _, pivots = scipy.linalg.qr(rows_MR.T, mode="r", pivoting=True, check_finite=False)
    return np.sort(pivots[: rows_MR.shape[1]])


def _reorder(linear: nn.Module, order_M: Tensor, *, reads: bool) -> None:
    """Put the neurons that ``linear`` reads or writes into a new order."""
    if isinstance(linear, FactoredLinear):
        part = linear.down if reads else linear.up
    elif isinstance(linear, nn.Linear):
        part = linear
    else:
        return  # removed, and without a bias as all of an MLP that has a skeleton
    weight, order_M = part.weight, order_M.to(part.weight.device)
    weight.copy_(weight[:, order_M] if reads else weight[order_M])


def _interpolative(pair: FactoredLinear, start: int, reads: bool) -> SkeletonLinear:
    """The same matrix with ``rank`` neurons from ``start`` as its skeleton."""
    up_OR, down_RI = pair.up.weight.double(), pair.down.weight.double()
    new = SkeletonLinear(
        pair.in_features, pair.out_features, pair.rank, start, reads, device=up_OR.device
    )
    neurons_MR, other_RN = (down_RI.T, up_OR.T) if reads else (up_OR, down_RI)
    place_M = torch.arange(len(neurons_MR))
    inside_M = (place_M >= start) & (place_M < start + pair.rank)
    rows_MR = torch.from_numpy(_neuron_rows(pair, reads))
    rest_NR = _interpolation(rows_MR[inside_M], rows_MR[~inside_M]).to(up_OR.device)
    values_RN = neurons_MR[inside_M.to(up_OR.device)] @ other_RN
    new.down.weight.copy_(rest_NR.T if reads else values_RN)
    new.up.weight.copy_(values_RN.T if reads else rest_NR)
    return new


def _interpolation(skeleton_RR: Tensor, rest_NR: Tensor) -> Tensor:
    """X with X · skeleton = rest; the least one where the pair has less than its rank."""
    try:
        return torch.linalg.solve(skeleton_RR, rest_NR, left=False)
    except torch.linalg.LinAlgError:
        return torch.linalg.lstsq(skeleton_RR.T, rest_NR.T, driver="gelsd").solution.T
