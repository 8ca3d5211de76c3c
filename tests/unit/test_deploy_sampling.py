"""The next token: greedy, and frequencies of draws against the distribution they should have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deploy.sampling import Sampler, SamplingSettings
from distill.artifact import UserError

LOGITS_V = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))
DRAWS = 4000
FOUR_SIGMA = 4


def frequencies(settings: SamplingSettings, logits_V: np.ndarray = LOGITS_V) -> np.ndarray:
    sampler = Sampler(settings)
    drawn = [sampler.next(logits_V) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=logits_V.size) / DRAWS


def assert_drawn_from(found_V: np.ndarray, expected_V: np.ndarray) -> None:
    """Four standard errors, and nothing that cannot be drawn."""
    expected_V = expected_V / expected_V.sum()
    error_V = np.sqrt(expected_V * (1 - expected_V) / DRAWS)
    assert (np.abs(found_V - expected_V) <= FOUR_SIGMA * error_V + 1e-12).all(), found_V


PROBABILITIES_V = np.exp(LOGITS_V).astype(np.float64)
CASES = {
    "temperature 1": (SamplingSettings(seed=1), PROBABILITIES_V),
    "temperature 0.5": (SamplingSettings(temperature=0.5, seed=1), PROBABILITIES_V**2),
    "temperature 2": (SamplingSettings(temperature=2.0, seed=1), PROBABILITIES_V**0.5),
    "top-k 2": (SamplingSettings(top_k=2, seed=1), PROBABILITIES_V * [1, 1, 0, 0, 0]),
    "top-k beyond the vocabulary": (SamplingSettings(top_k=99, seed=1), PROBABILITIES_V),
    "top-p 0.65": (SamplingSettings(top_p=0.65, seed=1), PROBABILITIES_V * [1, 1, 0, 0, 0]),
    "top-p 0.75": (SamplingSettings(top_p=0.75, seed=1), PROBABILITIES_V * [1, 1, 1, 0, 0]),
    "top-p smaller than any": (SamplingSettings(top_p=1e-6, seed=1), np.array([1.0, 0, 0, 0, 0])),
    "min-p 0.4": (SamplingSettings(min_p=0.4, seed=1), PROBABILITIES_V * [1, 1, 1, 0, 0]),
    "top-k, then top-p": (
        SamplingSettings(top_k=3, top_p=0.7, seed=1),
        PROBABILITIES_V * [1, 1, 0, 0, 0],
    ),
    "bias": (
        SamplingSettings(logit_bias={4: math.log(10), 0: -100.0}, seed=1),
        PROBABILITIES_V * [0, 1, 1, 1, 10],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str) -> None:
    settings, expected_V = CASES[name]
    assert_drawn_from(frequencies(settings), expected_V)


def test_another_distribution_is_noticed() -> None:
    """The twin: temperature 1.2 is not mistaken for temperature 1."""
    with pytest.raises(AssertionError):
        assert_drawn_from(frequencies(SamplingSettings(temperature=1.2, seed=1)), PROBABILITIES_V)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(top_p: float) -> None:
    logits_V = np.random.default_rng(0).normal(scale=3, size=20_000).astype(np.float32)
    probabilities_V = np.exp(logits_V.astype(np.float64))
    probabilities_V /= probabilities_V.sum()
    order = np.argsort(-probabilities_V)
    count = int((np.cumsum(probabilities_V[order]) >= top_p).argmax()) + 1
    sampler = Sampler(SamplingSettings(top_p=top_p, seed=2))
    drawn = {sampler.next(logits_V) for _ in range(300)}
    assert drawn <= set(order[:count].tolist())
    if count > 20:
        assert len(drawn) > 10


def test_greedy_takes_the_likeliest() -> None:
    logits_V = LOGITS_V[::-1].copy()
    for settings in (SamplingSettings(temperature=0), SamplingSettings(top_k=1)):
        assert {Sampler(settings).next(logits_V) for _ in range(20)} == {4}
    assert (logits_V == LOGITS_V[::-1]).all()


def test_a_seed_repeats_and_another_does_not() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(seed=seed))
        return [sampler.next(LOGITS_V) for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    """As transformers: positive logits are divided, negative ones multiplied."""
    logits_V = np.array([2.0, 1.8, 1.7, -1.0], np.float32)
    settings = SamplingSettings(temperature=0, repetition_penalty=1.25)
    assert Sampler(settings).next(logits_V) == 0
    assert Sampler(settings, [0]).next(logits_V) == 1
    assert Sampler(settings, [0, 0, 0]).next(logits_V, [1]) == 2
    assert Sampler(settings).next(np.array([-1.0, -1.1], np.float32), [0]) == 1


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_V = np.random.default_rng(1).normal(size=50).astype(np.float32)
    seen = [3, 7, 7, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([seen]), torch.tensor(logits_V)[None].clone()
    )
    settings = SamplingSettings(repetition_penalty=1.7)
    found_V = Sampler(settings, seen[:2])._penalised(logits_V, seen[2:])
    np.testing.assert_allclose(found_V, expected[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    logits_V = np.array([2.0, 1.5, 1.0], np.float32)
    present = SamplingSettings(temperature=0, presence_penalty=0.6)
    assert Sampler(present, [0, 0]).next(logits_V) == 0
    assert Sampler(present).next(logits_V, [0, 0, 0]) == 1
    often = SamplingSettings(temperature=0, frequency_penalty=0.4)
    assert Sampler(often).next(logits_V, [0]) == 0
    assert Sampler(often).next(logits_V, [0, 0]) == 1
    assert Sampler(often).next(logits_V, [0, 0, 1, 1, 0]) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_are_errors(value: float, temperature: float) -> None:
    logits_V = LOGITS_V.copy()
    logits_V[3] = value
    with pytest.raises(ValueError, match="needs finite numbers"):
        Sampler(SamplingSettings(temperature=temperature)).next(logits_V)


def test_extreme_logits_and_temperatures() -> None:
    logits_V = np.array([3e38, -3e38, 0.0], np.float32)
    for temperature in (1e-300, 1e-3, 1.0, 100.0):
        assert Sampler(SamplingSettings(temperature=temperature)).next(logits_V) == 0
    masked_V = np.array([-np.inf, 1.0, -np.inf], np.float32)
    assert {Sampler(SamplingSettings(top_p=0.9)).next(masked_V) for _ in range(20)} == {1}


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(UserError) as error:
        SamplingSettings(temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=0, seed=-1)
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert name in str(error.value)
    assert "\n" not in str(error.value)
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="temperature"):
            SamplingSettings(temperature=value)
