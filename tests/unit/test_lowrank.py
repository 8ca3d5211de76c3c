"""The two-sided SVD: exact at full rank, optimal at every lower one, in the metric it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill.lowrank import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    balanced,
    break_even_rank,
    damped,
    two_sided_svd,
)

SHAPES = [(24, 40), (40, 24), (32, 32)]


def moment(size: int, samples: int, seed: int) -> Tensor:
    """E[x xᵀ] of correlated samples; singular where ``samples`` is less than ``size``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    x = torch.randn(samples, size, generator=generator) @ mixing
    return x.T @ x / samples


def problem(shape: tuple[int, int], samples: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return weight, moment(shape[1], samples, 2), moment(shape[0], samples, 3)


def cost(difference_OI: Tensor, input_moment: Tensor, gradient_moment: Tensor) -> float:
    """tr(Δᵀ G Δ S): twice the loss that a change Δ of the weight costs, by definition."""
    d = difference_OI.double()
    return float(torch.trace(d.T @ gradient_moment.double() @ d @ input_moment.double()))


def assert_equal_weights(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("samples", [400, 7], ids=["regular", "singular"])
def test_all_terms_together_are_the_weight(shape: tuple[int, int], samples: int) -> None:
    weight, S, G = problem(shape, samples)
    factors = two_sided_svd(weight, S, G)
    up, down = factors.truncated(min(shape))
    assert_equal_weights(factors.up_OK @ factors.down_KI, weight)
    assert_equal_weights(up @ down, weight)
    with pytest.raises(AssertionError):
        assert_equal_weights(up[:, :-1] @ down[:-1], weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_energy_is_the_cost_of_truncation_and_no_weight_of_that_rank_costs_less(
    shape: tuple[int, int], rank: int
) -> None:
    weight, S, G = problem(shape)
    S_damped, G_damped = damped(S, INPUT_DAMPING), damped(G, GRADIENT_DAMPING)
    factors = two_sided_svd(weight, S, G)
    up, down = factors.truncated(rank)
    ours = cost(weight - up @ down, S_damped, G_damped)
    half = torch.linalg.cholesky(G_damped).T @ weight.double() @ torch.linalg.cholesky(S_damped)
    optimum = float(torch.linalg.svdvals(half)[rank:].square().sum())
    assert ours == pytest.approx(optimum, rel=1e-4)
    assert float(factors.energy_K[rank:].sum()) == pytest.approx(optimum, rel=1e-8)
    for other in (two_sided_svd(weight, None, None), two_sided_svd(weight, S, None)):
        up, down = other.truncated(rank)
        assert cost(weight - up @ down, S_damped, G_damped) > 1.01 * optimum


@pytest.mark.parametrize("shape", SHAPES)
def test_without_moments_it_is_the_plain_svd(shape: tuple[int, int]) -> None:
    weight, _, _ = problem(shape)
    factors = two_sided_svd(weight, None, None)
    expected = torch.linalg.svdvals(weight.double()).square()
    torch.testing.assert_close(factors.energy_K, expected, rtol=1e-8, atol=1e-8)
    assert factors.energy_K.dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES)
def test_with_the_input_moment_alone_it_minimises_the_output_error(shape: tuple[int, int]) -> None:
    """SVD-LLM's criterion E‖(W − W')x‖²."""
    weight, S, _ = problem(shape)
    up, down = two_sided_svd(weight, S, None).truncated(6)
    half = weight.double() @ torch.linalg.cholesky(damped(S, INPUT_DAMPING))
    identity = torch.eye(shape[0])
    ours = cost(weight - up @ down, damped(S, INPUT_DAMPING), identity)
    assert ours == pytest.approx(float(torch.linalg.svdvals(half)[6:].square().sum()), rel=1e-4)


def test_half_the_tail_energy_predicts_the_loss_of_a_logistic_layer() -> None:
    """The estimate in nats against the true KL of a small truncation of a softmax layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator)
    weight = 0.5 * torch.randn(20, 12, generator=generator)
    log_p = (x @ weight.T).log_softmax(-1)
    p = log_p.exp()
    gradient_moment = torch.diag(p.mean(0)) - p.T @ p / len(p)
    factors = two_sided_svd(weight, x.T @ x / len(x), gradient_moment)
    up, down = factors.truncated(11)
    kl = (p * (log_p - (x @ (up @ down).T).log_softmax(-1))).sum(-1).mean()
    assert 0.5 * float(factors.energy_K[11:].sum()) == pytest.approx(float(kl), rel=0.4)


def test_balanced_terms_have_equal_norms_and_the_same_product() -> None:
    up, down = 100 * torch.randn(8, 3), 0.01 * torch.randn(3, 9)
    up_b, down_b = balanced(up, down)
    torch.testing.assert_close(up_b @ down_b, up @ down)
    torch.testing.assert_close(up_b.norm(dim=0), down_b.norm(dim=1))


def test_a_dead_module_is_factored_without_nan() -> None:
    factors = two_sided_svd(torch.zeros(6, 9), torch.zeros(9, 9), torch.zeros(6, 6))
    up, down = factors.truncated(4)
    assert torch.isfinite(up).all() and torch.isfinite(down).all()
    assert float(factors.energy_K.sum()) == 0
    assert not torch.any(up @ down)


def test_damping_leaves_its_argument_alone() -> None:
    original = moment(5, 2, 0).double()
    kept = original.clone()
    result = damped(original, 0.5)
    assert torch.equal(original, kept)
    expected = original + 0.5 * original.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(result, expected)
    assert float(torch.linalg.eigvalsh(result).min()) > 0


@given(out_features=st.integers(1, 20_000), in_features=st.integers(1, 20_000))
def test_break_even_rank_is_the_largest_that_saves(out_features: int, in_features: int) -> None:
    rank, per_rank = break_even_rank(out_features, in_features), out_features + in_features
    assert rank * per_rank < out_features * in_features <= (rank + 1) * per_rank
