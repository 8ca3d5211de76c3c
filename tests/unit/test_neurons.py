"""Which neurons stay, and what those that go leave to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill import neurons as neurons_module
from distill.lowrank import GRADIENT_DAMPING, INPUT_DAMPING, damped
from distill.neurons import NeuronRanking, narrowed_reader, rank_neurons

M, O, SAMPLES = 12, 7, 60  # noqa: E741
Problem = tuple[Tensor, Tensor, Tensor]


def problem(seed: int, h_NM: Tensor | None = None) -> Problem:
    """A weight, correlated activations' moment of ``h_NM`` and a gradient moment."""
    torch.manual_seed(seed)
    if h_NM is None:
        h_NM = activations(seed)
    g_NO = torch.randn(SAMPLES, O) @ torch.randn(O, O)
    return torch.randn(O, M), h_NM.T @ h_NM / len(h_NM), g_NO.T @ g_NO / SAMPLES


def activations(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(M, M, generator=generator) + 2 * torch.eye(M)
    return torch.randn(SAMPLES, M, generator=generator) @ mixed


def loss_of_keeping(kept: list[int], weight_OM: Tensor, moment: Tensor, gradient: Tensor) -> float:
    """½ tr(G W (C − C_J C_JJ⁻¹ C_Jᵀ) Wᵀ), term by term."""
    C, G = damped(moment, INPUT_DAMPING), damped(gradient, GRADIENT_DAMPING)
    W, C_J = weight_OM.double(), C[:, kept]
    lost = C - C_J @ torch.linalg.inv(C[kept][:, kept]) @ C_J.T
    return 0.5 * float((G @ W @ lost @ W.T).trace())


def greedy_order(*given: Tensor) -> list[int]:
    """The last to go first, by trying every neuron at every step."""
    left, gone = list(range(M)), []
    while left:
        going = min(left, key=lambda j: loss_of_keeping([n for n in left if n != j], *given))
        left.remove(going)
        gone.append(going)
    return gone[::-1]


def assert_greedy(ranking: NeuronRanking, given: Problem) -> None:
    assert ranking.order_M.tolist() == greedy_order(*given)


def assert_energies_add_up(ranking: NeuronRanking, given: Problem, step: int = 1) -> None:
    """At every width that is a multiple of ``step``; nothing is lost where all stay."""
    order = ranking.order_M.tolist()
    assert sorted(order) == list(range(M)) and ranking.energy_M.dtype == torch.float64
    for k in range(0, M + 1, step):
        loss = loss_of_keeping(order[:k], *given)
        assert float(ranking.energy_M[k:].sum()) == pytest.approx(2 * loss, rel=1e-6, abs=1e-8)
    assert float(ranking.energy_M.sum()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_exact_loss_and_energies_are_its_growth(seed: int) -> None:
    given = problem(seed)
    ranking = rank_neurons(*given)
    assert_greedy(ranking, given)
    assert_energies_add_up(ranking, given)


@pytest.mark.parametrize("blind", ["weight", "moment", "gradient"])
def test_a_ranking_that_does_not_see_one_of_the_three_is_noticed(blind: str) -> None:
    given = problem(0)
    seen = dict(zip(("weight", "moment", "gradient"), given, strict=True))
    seen[blind] = torch.ones(O, M) if blind == "weight" else torch.eye(len(seen[blind]))
    wrong = rank_neurons(*seen.values())
    for check in (assert_greedy, assert_energies_add_up):
        with pytest.raises(AssertionError):
            check(wrong, given)


def test_energies_of_another_order_are_noticed() -> None:
    given = problem(1)
    ranking = rank_neurons(*given)
    with pytest.raises(AssertionError):
        assert_energies_add_up(replace(ranking, order_M=ranking.order_M.flip(0)), given)


def test_several_that_go_in_one_round_share_their_exact_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neurons_module, "ROUNDS", 4)
    given = problem(2)
    ranking = rank_neurons(*given)
    assert_energies_add_up(ranking, given, step=3)
    assert (ranking.energy_M.view(4, 3) == ranking.energy_M[::3, None]).all()
    with pytest.raises(AssertionError):
        assert_energies_add_up(ranking, given)


def test_a_duplicate_and_a_dead_neuron_go_first_and_cost_almost_nothing() -> None:
    h_NM = torch.randn(500, M)
    live_M = rank_neurons(*problem(3, h_NM)).energy_M
    h_NM[:, 5], h_NM[:, 7] = h_NM[:, 2], 0
    ranking = rank_neurons(*problem(3, h_NM))
    last, energy_M = set(ranking.order_M[-2:].tolist()), ranking.energy_M
    assert 7 in last and last & {2, 5} and last <= {2, 5, 7}
    assert float(energy_M[-2:].sum()) < 1e-2 * float(energy_M.median())
    assert float(live_M[-2:].sum()) > 0.1 * float(live_M.median())


def assert_least_squares(narrow_OK: Tensor, weight_OM: Tensor, h_NM: Tensor, kept: Tensor) -> None:
    """What no linear map of the neurons that stay is closer to: W h, on ``h_NM`` and on the samples
    whose moment is the damping."""
    moment = h_NM.T @ h_NM / len(h_NM)
    extra = (len(h_NM) * INPUT_DAMPING * moment.diagonal().mean()).sqrt() * torch.eye(M)
    samples = torch.cat([h_NM, extra]).double()
    best = torch.linalg.lstsq(samples[:, kept], samples @ weight_OM.double().T).solution.T
    torch.testing.assert_close(narrow_OK.double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, M - 1, M])
def test_the_columns_that_stay_are_the_least_squares_solution(count: int) -> None:
    h_NM, weight_OM = activations(4), torch.randn(O, M)
    kept = torch.randperm(M)[:count]
    moment = h_NM.T @ h_NM / SAMPLES
    narrow_OK = narrowed_reader(weight_OM, moment, kept)
    assert (narrow_OK.shape, narrow_OK.dtype) == ((O, count), torch.float32)
    assert_least_squares(narrow_OK, weight_OM, h_NM, kept)
    cut_OK = weight_OM[:, kept]
    if count == M:
        torch.testing.assert_close(narrow_OK, cut_OK, rtol=1e-5, atol=1e-5)
        cut_OK = cut_OK.roll(1, 1)
    with pytest.raises(AssertionError):
        assert_least_squares(cut_OK, weight_OM, h_NM, kept)


def test_the_ranking_promises_what_the_reader_then_loses() -> None:
    """The estimated loss is the error of the narrowed reader on its samples (but for damping)."""
    h_NM = activations(5)
    given = weight_OM, moment, gradient = problem(5, h_NM)
    ranking = rank_neurons(*given)
    half_OO = torch.linalg.cholesky(damped(gradient, GRADIENT_DAMPING)).float()
    for count in (4, 8):
        kept = ranking.order_M[:count]
        lost_NO = h_NM @ weight_OM.T - h_NM[:, kept] @ narrowed_reader(weight_OM, moment, kept).T
        error = float((lost_NO @ half_OO).square().sum() / SAMPLES)
        assert error == pytest.approx(float(ranking.energy_M[count:].sum()), rel=0.05)
        dropped_NO = h_NM @ weight_OM.T - h_NM[:, kept] @ weight_OM[:, kept].T
        assert float((dropped_NO @ half_OO).square().sum() / SAMPLES) > 1.1 * error
