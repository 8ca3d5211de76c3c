"""From logits to the next token, in numpy: greedy, temperature, top-k, top-p, min-p, penalties.

The order is that of transformers' generate: penalties, bias, temperature, top-k, top-p, min-p.
Shapes: V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill.commit import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn. Neutral values leave the model's own distribution.

    Args:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the smallest set of likeliest tokens whose probabilities reach p; 1: all.
        min_p: only tokens with at least this share of the likeliest one's probability; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of every token that
            prompt or answer hold (CTRL, arXiv 1909.05858); 1: none.
        presence_penalty, frequency_penalty: subtracted once, and for each time, that the answer
            holds a token (OpenAI); 0: none.
        logit_bias: added to the logits of these tokens.
        seed: None: another answer each time.
    Raises: UserError that names every value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0, "a number from 0"),
            "top_k": (self.top_k >= 0, "a whole number from 0"),
            "top_p": (0 < self.top_p <= 1, "0 < value ≤ 1"),
            "min_p": (0 <= self.min_p <= 1, "0 ≤ value ≤ 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "seed": (self.seed is None or self.seed >= 0, "a whole number from 0"),
        }
        problems = [
            f"{name} {getattr(self, name)}: allowed is {allowed}"
            for name, (fits, allowed) in ranges.items()
            if not fits or getattr(self, name) == math.inf
        ]
        if problems:
            raise UserError("; ".join(problems) + "; choose other values")


class Sampler:
    """Draws the tokens of one answer; its random numbers are its own.

    Args:
        prompt_ids: what the repetition penalty counts beside the answer.
    """

    def __init__(self, settings: SamplingSettings, prompt_ids: Sequence[int] = ()) -> None:
        self.settings = settings
        self._prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._random = np.random.default_rng(settings.seed)

    def next(self, logits_V: np.ndarray, generated_ids: Sequence[int] = ()) -> int:
        """The next token. `logits_V` stays as it is.

        Raises: ValueError when the logits are not finite where they matter.
        """
        scores_V = self._penalised(logits_V, generated_ids)
        best = int(scores_V.argmax())
        if not math.isfinite(scores_V[best]):
            raise ValueError(f"the engine gave a logit of {scores_V[best]}; needs finite numbers")
        if self.settings.temperature == 0 or self.settings.top_k == 1:
            return best
        tokens_C, weights_C = _candidates(scores_V, scores_V[best], self.settings)
        cumulative_C = np.cumsum(weights_C)
        place = np.searchsorted(cumulative_C, self._random.random() * cumulative_C[-1], "right")
        place = min(int(place), len(cumulative_C) - 1)
        return place if tokens_C is None else int(tokens_C[place])

    def _penalised(self, logits_V: np.ndarray, generated_ids: Sequence[int]) -> np.ndarray:
        s = self.settings
        repeated = s.repetition_penalty != 1
        counted = bool(generated_ids) and (s.presence_penalty or s.frequency_penalty)
        if not (repeated or counted or s.logit_bias):
            return logits_V
        scores_V = logits_V.astype(np.float32)
        if repeated:
            generated = np.asarray(generated_ids, dtype=np.int64)
            seen = np.concatenate([self._prompt, generated])
            found = logits_V[seen]
            factor = np.where(found > 0, 1 / s.repetition_penalty, s.repetition_penalty)
            scores_V[seen] = found * factor
        if counted:
            counts = Counter(generated_ids)
            tokens = np.fromiter(counts, np.int64, len(counts))
            times = np.fromiter(counts.values(), np.float32, len(counts))
            scores_V[tokens] -= s.presence_penalty + s.frequency_penalty * times
        for token, bias in s.logit_bias.items():
            scores_V[token] += bias
        return scores_V


def _candidates(
    scores_V: np.ndarray, highest: float, settings: SamplingSettings
) -> tuple[np.ndarray | None, np.ndarray]:
    """Token ids (None: every token in order) and unnormalised probabilities of what may be drawn.

    Ties at the edge of top-k are cut by token id.
    """
    tokens_C: np.ndarray | None = None
    if 0 < settings.top_k < scores_V.size:
        tokens_C = np.argpartition(-scores_V, settings.top_k - 1)[: settings.top_k]
        scores_V = scores_V[tokens_C]
    with np.errstate(under="ignore", over="ignore"):
        shifted_C = (scores_V.astype(np.float64) - float(highest)) / settings.temperature
        weights_C = np.exp(shifted_C)
    if settings.top_p < 1:
        kept = _nucleus(weights_C, settings.top_p)
        tokens_C = kept if tokens_C is None else tokens_C[kept]
        weights_C = weights_C[kept]
    if settings.min_p > 0:
        kept = np.flatnonzero(weights_C >= settings.min_p * weights_C.max())
        tokens_C = kept if tokens_C is None else tokens_C[kept]
        weights_C = weights_C[kept]
    return tokens_C, weights_C


def _nucleus(weights_C: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the smallest set of largest weights that reaches `top_p` of their sum.

    Only weights above (1 - p)/C of the sum can belong to it, for all those below come to less than
    1 - p together: so few are sorted instead of the whole vocabulary.
    """
    total = weights_C.sum()
    likely = np.flatnonzero(weights_C >= (1 - top_p) / weights_C.size * total)
    order = likely[np.argsort(-weights_C[likely], kind="stable")]
    reached = np.cumsum(weights_C[order]) >= top_p * total
    count = int(reached.argmax()) + 1 if reached.any() else order.size
    return order[:count]
