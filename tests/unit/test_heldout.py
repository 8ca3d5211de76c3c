"""Held-out perplexity and KL against transformers' own loss and torch's kl_div."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill.heldout import CHUNK, HeldoutScores, score_heldout

Model = Callable[..., PreTrainedModel]
WINDOWS, SEQ_LEN = 3, CHUNK + 41


@pytest.fixture
def ids_NT() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 384, (WINDOWS, SEQ_LEN)).astype(np.int32)


@torch.no_grad()
def reference(
    teacher: PreTrainedModel, student: PreTrainedModel, ids_NT: np.ndarray
) -> HeldoutScores:
    """One window at a time: ``labels=`` for the likelihood, whole-vocabulary logits for the KL."""
    losses: list[tuple[float, float]] = []
    divergences: list[float] = []
    for window in ids_NT:
        ids = torch.from_numpy(window).long()[None]
        p, q = teacher(input_ids=ids, labels=ids), student(input_ids=ids, labels=ids)
        losses.append((float(p.loss), float(q.loss)))
        log_p, log_q = (out.logits[0, :-1].double().log_softmax(-1) for out in (p, q))
        divergences.append(float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")))
    teacher_nll, student_nll = np.mean(losses, axis=0)
    count = len(ids_NT) * (ids_NT.shape[1] - 1)
    return HeldoutScores(
        math.exp(teacher_nll), math.exp(student_nll), float(np.mean(divergences)), count
    )


def assert_same(actual: HeldoutScores, expected: HeldoutScores) -> None:
    assert actual.to_json() == pytest.approx(expected.to_json(), rel=1e-4)


def test_scores_equal_an_independent_implementation(
    family: str, tiny_model: Model, ids_NT: np.ndarray
) -> None:
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    scores = score_heldout(teacher, student, ids_NT)
    assert_same(scores, reference(teacher, student, ids_NT))
    assert scores.tokens == WINDOWS * (SEQ_LEN - 1)
    for broken in (
        reference(student, teacher, ids_NT),
        reference(teacher, student, ids_NT[:, :CHUNK]),
        reference(teacher, tiny_model(family, seed=2), ids_NT),
    ):
        with pytest.raises(AssertionError):
            assert_same(scores, broken)


def test_a_model_against_itself(tiny_model: Model, ids_NT: np.ndarray) -> None:
    model, counted = tiny_model("llama"), list[int]()
    scores = score_heldout(model, model, ids_NT, counted.append)
    assert scores.kl == 0 and scores.teacher_perplexity == scores.student_perplexity
    assert sum(counted) == ids_NT.size
