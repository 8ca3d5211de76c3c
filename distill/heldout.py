"""Perplexity and KL to the teacher on held-out text.

Shape legend: N windows, T tokens, C chunk of positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

CHUNK = 256


@dataclass(frozen=True)
class HeldoutScores:
    """``perplexity`` per token; ``kl`` of the student to the teacher, nats per token."""

    teacher_perplexity: float
    student_perplexity: float
    kl: float
    tokens: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def score_heldout(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    ids_NT: np.ndarray,
    advance: Callable[[int], None] = lambda tokens: None,
) -> HeldoutScores:
    """Both models on the same windows; every token but a window's first is predicted."""
    sums = torch.zeros(3, dtype=torch.float64)
    for window_T in ids_NT:
        ids_1T = torch.from_numpy(window_T.astype(np.int64))[None].to(student.device)
        sums += _window_sums(teacher, student, ids_1T)
        advance(ids_1T.numel())
    count = ids_NT.size - len(ids_NT)
    teacher_nll, student_nll, kl = (sums / count).tolist()
    return HeldoutScores(math.exp(teacher_nll), math.exp(student_nll), kl, count)


def _window_sums(teacher: PreTrainedModel, student: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    """Negative log-likelihoods of teacher and student and their KL, summed over positions; over
    the vocabulary that they share, where one pads it further."""
    hidden = [
        m.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0] for m in (teacher, student)
    ]
    heads = [m.get_output_embeddings() for m in (teacher, student)]
    vocabulary = min(len(head.weight) for head in heads)
    targets_T = ids_1T[0, 1:]
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets_T), CHUNK):
        target_C1 = targets_T[start : start + CHUNK, None]
        rows = slice(start, start + len(target_C1))
        log_p_CV, log_q_CV = (
            head(h_TD[rows])[:, :vocabulary].float().log_softmax(-1)
            for head, h_TD in zip(heads, hidden, strict=True)
        )
        kl = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum()
        nll = [-log_CV.gather(1, target_C1).sum() for log_CV in (log_p_CV, log_q_CV)]
        sums += torch.stack([*nll, kl]).double().cpu()
    return sums
