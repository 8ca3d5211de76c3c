"""Perplexity, bits per byte and KL to the teacher, window by window, for any contender.

The text is one stream of tokens. Windows of `window` tokens start every `stride`; a token is
scored in the first window that reaches it (the very first only behind a prefix), so that with
stride < window all but the first window's tokens have window − stride or more before them.

Shapes: N windows, T tokens of a window, C scored positions of a piece, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluate.bootstrap import interval95, ratio_interval95, resampled_sums
from evaluate.runners import Runner, prefill

CHUNK = 128


@dataclass(frozen=True)
class Window:
    """Token ids and the first position whose token is scored; `size_bytes` of the scored text."""

    ids_T: np.ndarray
    first: int
    size_bytes: int

    @property
    def scored(self) -> int:
        return len(self.ids_T) - self.first


@dataclass(frozen=True)
class WindowScores:
    """Sums over each window's scored tokens: nats, KL nats, and same first choices; all [N]."""

    nll_N: np.ndarray
    kl_N: np.ndarray
    agree_N: np.ndarray
    tokens_N: np.ndarray
    bytes_N: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Perplexity, bits per byte and KL (nats per token), each with its 95 % interval."""
        nll, kl, agree, tokens, size = resampled_sums(
            [self.nll_N, self.kl_N, self.agree_N, self.tokens_N, self.bytes_N]
        )
        total, size_bytes = float(self.tokens_N.sum()), float(self.bytes_N.sum())
        bits = math.log(2)
        figures: dict[str, Any] = {
            "perplexity": math.exp(self.nll_N.sum() / total),
            "perplexity_interval95": interval95(np.exp(nll / tokens)),
            "bits_per_byte": self.nll_N.sum() / bits / size_bytes if size_bytes else None,
            "bits_per_byte_interval95": interval95(nll / bits / size) if size.all() else None,
            "kl_nats_per_token": self.kl_N.sum() / total,
            "kl_nats_per_token_interval95": interval95(kl / tokens),
            "same_first_choice": self.agree_N.sum() / total,
            "same_first_choice_interval95": interval95(agree / tokens),
        }
        counts = {
            "tokens": int(total),
            "bytes": int(size_bytes),
            "windows": len(self.tokens_N),
        }
        return {**{k: _plain(v) for k, v in figures.items()}, **counts}


def perplexity_ratio(contender: WindowScores, other: WindowScores) -> dict[str, Any]:
    """Perplexity ÷ another contender's on the same windows, resampled together."""
    mine, its, tokens = resampled_sums([contender.nll_N, other.nll_N, other.tokens_N])
    gap = (contender.nll_N.sum() - other.nll_N.sum()) / other.tokens_N.sum()
    interval = ratio_interval95(np.exp(mine / tokens), np.exp(its / tokens))
    return {
        "perplexity_ratio": math.exp(gap),
        "perplexity_ratio_interval95": _plain(interval),
    }


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    stream: np.ndarray,
    *,
    window: int,
    stride: int,
    limit: int,
    prefix: Sequence[int] = (),
) -> list[Window]:
    """Up to `limit` windows over `stream`; `prefix` (bos) stands before each and is not scored.

    Raises: ValueError unless 1 ≤ stride ≤ window − len(prefix).
    """
    body = window - len(prefix)
    if not 1 <= stride <= body:
        raise ValueError(f"stride {stride} must be 1 to {body}")
    head = np.array(prefix, dtype=np.int64)
    windows: list[Window] = []
    reached = 0
    for start in range(0, max(1, len(stream) - body + stride), stride):
        ids = np.concatenate([head, stream[start : start + body]]).astype(np.int64)
        first = max(len(head) + reached - start, 1)
        if len(ids) <= first or len(windows) == limit:
            break
        text = str(tokenizer.decode(ids[first:].tolist(), skip_special_tokens=True))
        windows.append(Window(ids, first, len(text.encode("utf-8"))))
        reached = start + len(ids) - len(head)
    return windows


class TeacherReference:
    """The teacher's distributions on the windows, kept as last hidden states and its head.

    That is exact and small: D numbers a position where the distribution has V.
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[Window]) -> None:
        self._head = model.get_output_embeddings()
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._hidden: list[Tensor] = []
        backbone: Any = model.model
        with torch.no_grad():
            for window in windows:
                ids_1T = torch.from_numpy(window.ids_T)[None].to(model.device)
                hidden_TD = backbone(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
                self._hidden.append(hidden_TD[window.first - 1 : -1])

    def log_probabilities(self, place: int, rows: slice) -> Tensor:
        """float32 [C, V] of some scored positions of window `place`."""
        with torch.no_grad():
            logits_CV = self._head(self._hidden[place][rows]).float().cpu()
        if self._softcap:
            logits_CV = torch.tanh(logits_CV / self._softcap) * self._softcap
        return logits_CV.log_softmax(-1)


def score_windows(
    runner: Runner,
    windows: Sequence[Window],
    reference: TeacherReference,
    advance: Callable[[int], None] = lambda tokens: None,
) -> WindowScores:
    """Score every window; the same code for PyTorch models, ONNX sessions and engines.

    Raises: FloatingPointError when the contender returns NaN or infinities.
    """
    sums_N3 = np.zeros((len(windows), 3))
    for place, window in enumerate(windows):
        logits_1KV, _ = prefill(runner, window.ids_T[None], keep=window.scored + 1)
        sums_N3[place] = _window_sums(logits_1KV[0, :-1], window, reference, place)
        advance(len(window.ids_T))
    tokens_N = np.array([w.scored for w in windows], dtype=np.float64)
    bytes_N = np.array([w.size_bytes for w in windows], dtype=np.float64)
    kl_N = np.maximum(sums_N3[:, 1], 0.0)  # rounding alone can bring it below
    return WindowScores(sums_N3[:, 0], kl_N, sums_N3[:, 2], tokens_N, bytes_N)


def _window_sums(
    logits_KV: np.ndarray, window: Window, reference: TeacherReference, place: int
) -> np.ndarray:
    """Sums of negative log-likelihood, KL(teacher ‖ contender) and agreement of the first choice,
    over the vocabulary that both have where one pads it further."""
    if not np.isfinite(logits_KV).all():
        raise FloatingPointError("the model returned NaN or infinite logits on the text")
    targets_K = torch.from_numpy(window.ids_T[window.first :])
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets_K), CHUNK):
        rows = slice(start, min(start + CHUNK, len(targets_K)))
        log_p_CV = reference.log_probabilities(place, rows)
        shared = min(log_p_CV.shape[1], logits_KV.shape[1])
        log_q_CV = torch.from_numpy(logits_KV[rows, :shared].astype(np.float32)).log_softmax(-1)
        if shared < log_p_CV.shape[1]:
            log_p_CV = log_p_CV[:, :shared].log_softmax(-1)
        nll = -log_q_CV.gather(1, targets_K[rows, None]).double().sum()
        kl = (log_p_CV.exp() * (log_p_CV - log_q_CV)).double().sum()
        agree = (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).double().sum()
        sums += torch.stack([nll, kl, agree])
    return sums.numpy()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    return [float(v) for v in value] if isinstance(value, (tuple, list)) else float(value)
