"""One choice of an answer while it is generated: from logits to pieces of text."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deploy.server_errors import ApiError

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class TokenSampler(Protocol):
    def next(self, logits_V: np.ndarray, generated_ids: Sequence[int]) -> int: ...


class Detokenizer(Protocol):
    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopWatch(Protocol):
    """Finds stop strings; holds back text that may become one."""

    def push(self, text: str) -> tuple[str, bool]: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability and the likeliest alternatives at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What one step added to a choice.

    `finish`: None while it goes on, else "stop" or "length". `error`: why there is no more.
    """

    choice: int
    text: str = ""
    generated: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: ApiError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Choice:
    """A prompt that waits, is processed, or is being continued.

    `sink` names whoever receives the deltas. `deadline_s` is on `time.monotonic`'s clock.
    """

    index: int
    prompt: tuple[int, ...]
    max_new: int
    sampler: TokenSampler
    detokenizer: Detokenizer
    stops: StopWatch
    end_tokens: Collection[int]
    top_logprobs: int | None
    sink: Any
    deadline_s: float
    submitted_s: float = field(default_factory=time.monotonic)
    generated: list[int] = field(default_factory=list)
    last_token_s: float = 0.0
    is_cancelled: bool = False
    _held: list[TokenLogprob] = field(default_factory=list)

    @property
    def final_length(self) -> int:
        """Most tokens that prompt and answer can come to."""
        return len(self.prompt) + self.max_new

    def accept(self, logits_V: np.ndarray, now_s: float) -> Delta:
        """Draw the next token from its logits [V]. Raises: ValueError when they are not finite."""
        token = self.sampler.next(logits_V, self.generated)
        if self.top_logprobs is not None:
            self._held.append(token_logprob(logits_V, token, self.top_logprobs))
        self.generated.append(token)
        self.last_token_s = now_s
        is_end = token in self.end_tokens
        piece = "" if is_end else self.detokenizer.push(token)
        is_full = len(self.generated) >= self.max_new or now_s >= self.deadline_s
        finish = "stop" if is_end else "length" if is_full else None
        if finish is not None:
            piece += self.detokenizer.flush()
        text, is_stopped = self.stops.push(piece)
        if is_stopped:
            finish = "stop"
        elif finish is not None:
            text += self.stops.flush()
        return self._delta(text, finish)

    def _delta(self, text: str, finish: str | None) -> Delta:
        """Log-probabilities travel with the next text that is sent."""
        logprobs: tuple[TokenLogprob, ...] = ()
        if text or finish is not None:
            logprobs, self._held = tuple(self._held), []
        return Delta(self.index, text, len(self.generated), logprobs, finish)


def token_logprob(logits_V: np.ndarray, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token` in the model's own distribution, with the likeliest others."""
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    logprobs_V = np.maximum(shifted_V - np.log(np.exp(shifted_V).sum()), LOWEST_LOGPROB)
    alternatives = min(alternatives, len(logprobs_V))
    top: list[tuple[int, float]] = []
    if alternatives:
        best = np.argpartition(logprobs_V, -alternatives)[-alternatives:]
        best = best[np.argsort(-logprobs_V[best], kind="stable")]
        top = [(int(index), float(logprobs_V[index])) for index in best]
    return TokenLogprob(token, float(logprobs_V[token]), tuple(top))
