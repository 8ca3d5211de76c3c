"""One small interface over every contender, so that perplexity, probes and timing share one path.

It is the interface of `deploy`'s runners: token ids and a cache in, float32 NumPy logits out.
`evaluate.torch_runner` gives PyTorch models the same one, `evaluate.peer_llama` llama.cpp. Nothing
here imports torch, so that an engine's memory is measured without it.

Shapes: B batch, S new positions, T cached and new positions, K positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Cache(Protocol):
    """Keys and values of the positions seen so far."""

    @property
    def length(self) -> int: ...

    def select(self, rows: Sequence[int]) -> Cache:
        """A cache of these rows, repeated or left out as named; this one stays as it is."""
        ...


class Runner(Protocol):
    """What is asked of a contender. `forward` appends to the cache it is given."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    def describe(self) -> dict[str, Any]: ...

    def new_cache(self, batch: int) -> Any: ...

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: Any,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """Logits float32 [B, K, V] of the last `logits_to_keep` positions."""
        ...


def prefill(runner: Runner, input_ids_BS: np.ndarray, keep: int = 1) -> tuple[np.ndarray, Any]:
    """Logits [B, keep, V] of whole prompts of equal length, and the cache behind them.

    A prompt longer than the engine takes at once goes in by pieces.
    """
    batch, length = input_ids_BS.shape
    cache = runner.new_cache(batch)
    step = min(length, getattr(runner, "max_new", None) or length)
    pieces = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        wanted = stop - max(start, length - keep)
        logits_BKV = runner.forward(
            input_ids_BS[:, start:stop],
            cache,
            attention_mask_BT=np.ones((batch, stop), np.int64),
            position_ids_BS=np.tile(np.arange(start, stop, dtype=np.int64), (batch, 1)),
            logits_to_keep=max(wanted, 1),
        )
        if wanted > 0:
            pieces.append(logits_BKV if step == length else logits_BKV.copy())
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1), cache


def greedy_step(runner: Runner, token_ids_B1: np.ndarray, cache: Any) -> np.ndarray:
    """Feed one token a row and return the most likely next ones, [B, 1]."""
    batch, past = len(token_ids_B1), cache.length
    logits_B1V = runner.forward(
        token_ids_B1,
        cache,
        attention_mask_BT=np.ones((batch, past + 1), np.int64),
        position_ids_BS=np.full((batch, 1), past, np.int64),
        logits_to_keep=1,
    )
    return logits_B1V[:, -1].argmax(-1)[:, None].astype(np.int64)


class Openable(Protocol):
    """What opening needs to know of a contender."""

    @property
    def engine(self) -> str: ...

    @property
    def provider(self) -> str: ...

    @property
    def directory(self) -> Path | None: ...

    @property
    def source(self) -> str: ...


def open_contender(contender: Openable, threads: int) -> Runner:
    """Load the contender with `threads` threads. Its files were checked when it was found.

    Raises: UserError when it cannot run on this machine; whatever its runtime raises otherwise.
    """
    if contender.engine == "llama.cpp":
        from evaluate.peer_llama import open_llama

        return open_llama(contender.source, threads)
    assert contender.directory is not None
    if contender.engine == "pytorch":
        from evaluate.torch_runner import open_student

        return open_student(contender.directory, threads)
    from deploy.runner import open_runner

    runner: Any = open_runner(
        contender.directory, provider=contender.provider, threads=threads, verify=False
    )
    return runner


def release(runner: Runner | None) -> None:
    """Give back what a runner holds beyond its Python objects."""
    close = getattr(runner, "close", None)
    if callable(close):
        close()
