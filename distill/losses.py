"""The distillation loss: forward KL on the vocabulary, and the hidden-state term that may join it,
the relative error of every block's output.

Shape legend: N positions, D hidden, V vocabulary, C chunk of positions, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VOCABULARY_CHUNK = 256


class _ChunkedKL(torch.autograd.Function):
    """Σ w·KL(teacher ‖ student) with the gradient computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, student_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor,
        weight_N: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        gradient_ND = torch.empty_like(student_ND)
        kl_N = student_ND.new_empty(len(student_ND), dtype=torch.float32)
        for start in range(0, len(student_ND), VOCABULARY_CHUNK):
            rows = slice(start, start + VOCABULARY_CHUNK)
            logits_CV = student_ND[rows] @ head_VD.T
            teacher_CV = teacher_ND[rows] @ teacher_head_VD.T
            kl_N[rows] = _kl_and_error_(logits_CV, teacher_CV)
            gradient_ND[rows] = (logits_CV @ head_VD) * weight_N[rows, None]
        ctx.save_for_backward(gradient_ND)
        return (kl_N * weight_N).sum(), kl_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream[0], None, None, None, None


def _kl_and_error_(logits_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """KL of every row (C,) in float32; ``logits_CV`` becomes its gradient, q − p. On a CPU one row
    a thread at a time, which stay in its cache."""
    rows = torch.get_num_threads() if logits_CV.device.type == "cpu" else VOCABULARY_CHUNK
    kl = []
    for logits, teacher in zip(logits_CV.split(rows), teacher_CV.split(rows), strict=True):
        s, t = logits.float(), teacher.float()
        q, p = s.softmax(-1), t.softmax(-1)
        log_sums = _log_sum(t, p) - _log_sum(s, q)
        kl.append(t.sub_(s).mul_(p).sum(-1) - log_sums)  # autocast would round a vecdot to bfloat16
        logits.copy_(q.sub_(p))
    return torch.cat(kl)


def _log_sum(logits_CV: Tensor, probability_CV: Tensor) -> Tensor:
    """log Σ exp of every row (C,), from its softmax without another exponential."""
    return logits_CV.amax(-1) - probability_CV.amax(-1).log()


def chunked_kl(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher_ND: Tensor,
    teacher_head_VD: Tensor,
    weight_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the per-position KL (nats), differentiable in ``student_ND`` only, and the
    unweighted KL of every position (N,). Holds at most 256 rows of vocabulary-sized float32 per
    model, whatever N is; the heads are frozen."""
    total, kl_N = _ChunkedKL.apply(student_ND, head_VD, teacher_ND, teacher_head_VD, weight_N)
    return total, kl_N.detach()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], weight_BT: Tensor) -> Tensor:
    """Mean over blocks of the weighted squared error of their outputs (B, T, D each), divided by
    the teacher's own weighted second moment: 0 is equal, 1 is as bad as silence."""
    terms = []
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        teacher_BTD = teacher_BTD.to(student_BTD.dtype)
        weight_BT1 = weight_BT[..., None]
        error = ((student_BTD - teacher_BTD).square() * weight_BT1).sum()
        terms.append(error / (teacher_BTD.square() * weight_BT1).sum())
    return torch.stack(terms).mean()
