"""The chunked KL against plain autograd, and the relative error of the block outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from distill.losses import VOCABULARY_CHUNK, _kl_and_error_, chunked_kl, hidden_error


@dataclass(frozen=True)
class Case:
    """N positions over more than two chunks; the teacher is wider than the student."""

    student_ND: Tensor
    head_VD: Tensor
    teacher_NE: Tensor
    teacher_head_VE: Tensor
    weight_N: Tensor


@pytest.fixture
def case() -> Case:
    positions = 2 * VOCABULARY_CHUNK + 37
    return Case(
        torch.randn(positions, 12),
        torch.randn(50, 12),
        torch.randn(positions, 20),
        0.5 * torch.randn(50, 20),
        torch.rand(positions) / positions,
    )


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, per-position KL and gradient by log_softmax and autograd in float64."""
    student = case.student_ND.double().requires_grad_()
    log_q = (student @ case.head_VD.double().T).log_softmax(-1)
    log_p = (case.teacher_NE.double() @ case.teacher_head_VE.double().T).log_softmax(-1)
    kl_N = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    total = (kl_N * case.weight_N.double()).sum()
    (gradient,) = torch.autograd.grad(total, student)
    return total.detach(), kl_N.detach(), gradient


def chunked(case: Case, upstream: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    student = case.student_ND.clone().requires_grad_()
    total, kl_N = chunked_kl(
        student, case.head_VD, case.teacher_NE, case.teacher_head_VE, case.weight_N
    )
    (upstream * total).backward()
    assert student.grad is not None and not kl_N.requires_grad
    return total.detach(), kl_N, student.grad


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-4, atol=1e-6)


def test_value_and_gradient_equal_plain_autograd(case: Case) -> None:
    assert_same(chunked(case), reference(case))


def test_the_comparison_notices_a_lost_weight_a_swap_and_a_lost_chunk(case: Case) -> None:
    swapped = replace(
        case, teacher_NE=case.student_ND, teacher_head_VE=case.head_VD,
        student_ND=case.teacher_NE, head_VD=case.teacher_head_VE,
    )  # fmt: skip
    cut = case.weight_N.clone()
    cut[2 * VOCABULARY_CHUNK :] = 0
    even = torch.full_like(case.weight_N, float(case.weight_N.mean()))
    for broken in (replace(case, weight_N=even), replace(case, weight_N=cut), swapped):
        with pytest.raises(AssertionError):
            assert_same(chunked(broken), reference(case))


def test_the_gradient_follows_its_upstream_factor(case: Case) -> None:
    torch.testing.assert_close(chunked(case, 3.0)[2], 3 * chunked(case)[2])


def test_equal_models_have_no_loss_and_no_gradient(case: Case) -> None:
    equal = replace(case, teacher_NE=case.student_ND, teacher_head_VE=case.head_VD)
    total, kl_N, gradient = chunked(equal)
    assert abs(float(total)) < 1e-6 and float(kl_N.abs().max()) < 1e-5
    assert float(gradient.abs().max()) < 1e-7


def test_kl_of_confident_distributions_is_finite(case: Case) -> None:
    sharp = replace(case, student_ND=100 * case.student_ND, teacher_NE=100 * case.teacher_NE)
    assert all(torch.isfinite(part).all() for part in chunked(sharp))


def test_autocast_does_not_round_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (
        torch.randn(20, 5000, generator=generator).to(torch.bfloat16) for _ in range(2)
    )
    expected_N = _kl_and_error_(logits.clone(), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_kl_and_error_(logits.clone(), teacher), expected_N)


def test_hidden_error_is_zero_for_equal_one_for_silent_and_follows_its_formula() -> None:
    teacher = [torch.randn(2, 5, 3), 10 * torch.randn(2, 5, 3)]
    student = [torch.randn(2, 5, 3, requires_grad=True) for _ in teacher]
    weight_BT = torch.rand(2, 5)
    assert float(hidden_error(teacher, teacher, weight_BT)) == 0
    silent = [torch.zeros_like(t) for t in teacher]
    assert float(hidden_error(silent, teacher, weight_BT)) == pytest.approx(1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        error = power = 0.0
        for b in range(2):
            for position in range(5):
                w = float(weight_BT[b, position])
                error += w * float((s[b, position] - t[b, position]).square().sum())
                power += w * float(t[b, position].square().sum())
        expected += 0.5 * error / power
    actual = hidden_error(student, teacher, weight_BT)
    assert float(actual) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_error(student, teacher, torch.ones(2, 5))) != pytest.approx(expected)
    actual.backward()
    assert all(s.grad is not None and s.grad.any() for s in student)


def test_hidden_error_takes_bfloat16_records_and_refuses_a_missing_block() -> None:
    student = [torch.randn(1, 4, 3)]
    recorded = [student[0].to(torch.bfloat16)]
    assert float(hidden_error(student, recorded, torch.ones(1, 4))) < 1e-4
    with pytest.raises(ValueError):
        hidden_error(student, recorded * 2, torch.ones(1, 4))
