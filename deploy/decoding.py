"""Prompts to answers over one engine: prompts in chunks, then all rows together, one token a step.

Rows that end make room for prompts that wait. What all prompts of a group start with is computed
once. Shapes: B rows, S new columns, T all columns, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.runner import Runner
from deploy.server_batch import Batch, forward
from deploy.server_choice import Choice, Delta
from distill.commit import UserError

PROMPT_COLUMNS = 512
SHARED_COLUMNS = 16  # a shorter common start is not worth a pass of its own

OnDelta = Callable[[Choice, Delta], None]


@dataclass
class Speed:
    """What a run took. `prompt_tokens` counts every prompt whole, shared starts included;
    `decoded_tokens` leaves out the tokens that the prompt passes gave."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decoded_tokens: int = 0
    decode_s: float = 0.0
    first_token_s: float | None = None

    def line(self) -> str:
        """For a person: tokens and tokens per second of both parts."""
        parts = [f"prompt {self.prompt_tokens} tokens, {_rate(self.prompt_tokens, self.prompt_s)}"]
        parts.append(
            f"answer {self.decoded_tokens} tokens after the first, "
            f"{_rate(self.decoded_tokens, self.decode_s)}"
        )
        if self.first_token_s is not None:
            parts.append(f"first token after {1e3 * self.first_token_s:.0f} ms")
        return "; ".join(parts)


def decode(
    runner: Runner,
    choices: Sequence[Choice],
    on_delta: OnDelta,
    *,
    batch_size: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Answer every choice; `on_delta` gets each piece of text as it comes.

    Raises: UserError for a prompt that does not fit, or when the engine gives no finite logits.
    """
    require_fit(runner, choices)
    speed, waiting, began = Speed(), deque(choices), clock()
    size = min(batch_size, runner.max_batch or batch_size)
    batch: Batch[Choice] | None = None
    next_of: dict[Choice, int] = {}
    while waiting or batch is not None:
        alive = 0 if batch is None else len(batch.rows)
        if waiting and alive <= size // 2:
            group = [waiting.popleft() for _ in range(min(size - alive, len(waiting)))]
            started = clock()
            fresh, logits_BV = prefill(runner, group)
            _accept(fresh, logits_BV, next_of, on_delta)
            speed.prompt_s += clock() - started
            speed.prompt_tokens += sum(len(choice.prompt) for choice in group)
            if speed.first_token_s is None:
                speed.first_token_s = clock() - began
            batch = _joined(batch, fresh)
        if batch is not None:
            started = clock()
            logits_BV = batch.step([next_of[row] for row in batch.rows if row is not None])
            speed.decoded_tokens += len(batch.rows)
            _accept(batch, logits_BV, next_of, on_delta)
            batch = batch if batch.rows else None
            speed.decode_s += clock() - started
    return speed


def prefill(runner: Runner, choices: Sequence[Choice]) -> tuple[Batch[Choice], np.ndarray]:
    """All prompts in a new cache, and the logits [B, V] behind them."""
    prompts = [choice.prompt for choice in choices]
    shared = _shared_start(prompts)
    cache, mask_BT = _started(runner, prompts, shared)
    rest = [prompt[shared:] for prompt in prompts]
    columns = max(map(len, rest))
    ids_BS = np.zeros((len(rest), columns), np.int64)
    mask_BS = np.zeros_like(ids_BS)
    for row, ids in enumerate(rest):
        ids_BS[row, columns - len(ids) :] = ids
        mask_BS[row, columns - len(ids) :] = 1
    step = min(PROMPT_COLUMNS, runner.max_new or PROMPT_COLUMNS)
    for start in range(0, columns, step):
        mask_BT = np.concatenate([mask_BT, mask_BS[:, start : start + step]], axis=1)
        logits_BV = forward(runner, ids_BS[:, start : start + step], cache, mask_BT)
    return Batch(runner, choices, cache, mask_BT), logits_BV


def require_fit(runner: Runner, choices: Sequence[Choice]) -> None:
    """Raise UserError for an empty prompt or one that leaves no room for its answer."""
    for choice in choices:
        length, limit = len(choice.prompt), runner.max_context
        if not length:
            raise UserError(
                f"prompt {choice.index} is empty; needs one token at least; give it some text"
            )
        if choice.final_length > limit:
            raise UserError(
                f"prompt {choice.index} has {length} tokens and may get {choice.max_new} more; "
                f"the model allows {limit} together; shorten it"
                + (" or lower --max-tokens" if length < limit else "")
            )


def _accept(
    batch: Batch[Choice], logits_BV: np.ndarray, next_of: dict[Choice, int], on_delta: OnDelta
) -> None:
    """Draw every row's next token, tell its text, and drop the rows that ended."""
    for index, choice in enumerate(batch.rows):
        assert choice is not None
        try:
            delta = choice.accept(logits_BV[index], 0.0)
        except ValueError as error:
            raise UserError(f"{error}; try another --precision of the export") from None
        next_of[choice] = choice.generated[-1]
        on_delta(choice, delta)
        if delta.is_last:
            batch.remove(index)
            del next_of[choice]
    if batch.alive:
        if len(batch.alive) < len(batch.rows):
            batch.compact()
    else:
        batch.rows = []


def _joined(batch: Batch[Choice] | None, fresh: Batch[Choice]) -> Batch[Choice] | None:
    if batch is None:
        return fresh if fresh.rows else None
    if fresh.rows:
        batch.join(fresh)
    return batch


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Columns that all prompts have in common and that are worth computing once; never a whole
    prompt, because each row needs logits of its own."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts))
    first = prompts[0]
    same = next((i for i in range(shortest) if any(p[i] != first[i] for p in prompts)), shortest)
    same = min(same, shortest - 1)
    return same if same >= SHARED_COLUMNS else 0


def _started(
    runner: Runner, prompts: Sequence[Sequence[int]], shared: int
) -> tuple[Any, np.ndarray]:
    """A cache of one row a prompt that holds the shared start, and its mask."""
    mask_BT = np.ones((len(prompts), shared), np.int64)
    if not shared:
        return runner.new_cache(len(prompts)), mask_BT
    cache = runner.new_cache(1)
    step = min(PROMPT_COLUMNS, runner.max_new or PROMPT_COLUMNS)
    for start in range(0, shared, step):
        ids_BS = np.asarray([prompts[0][start : min(start + step, shared)]], np.int64)
        forward(runner, ids_BS, cache, np.ones((1, start + ids_BS.shape[1]), np.int64))
    return cache.select([0] * len(prompts)), mask_BT


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.4g} tokens/s" if tokens and seconds else "- tokens/s"
