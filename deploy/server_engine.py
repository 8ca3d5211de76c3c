"""What the engine computes next: one token for every running choice, one chunk of new prompts.

No threads here: `server_scheduler` calls it, a turn at a time.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.runner import Runner
from deploy.server_batch import Batch, Prefill
from deploy.server_choice import Choice, Delta
from deploy.server_errors import ApiError
from deploy.server_metrics import Metrics

DEAD_SHARE = 0.25
SPARE_SHARE = 0.25
FEWEST_SPARE_COLUMNS = 16


@dataclass(frozen=True)
class EngineLimits:
    """`max_rows`: choices generated at once. `cache_tokens`: most rows times longest row.

    `prefill_tokens`: prompt tokens processed between two steps of the running choices.
    `vocabulary`: ids that may be drawn; an engine may give logits of more, which mean nothing.
    """

    max_rows: int
    cache_tokens: int
    prefill_tokens: int
    vocabulary: int


class Engine:
    """The running batch and the prompts on their way into it."""

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        metrics: Metrics,
        put: Callable[[Choice, Delta], None],
    ) -> None:
        self.runner = runner
        self.limits = limits
        self.metrics = metrics
        self._put = put
        self._running: Batch[Choice] | None = None
        self._prefill: Prefill[Choice] | None = None

    @property
    def batches(self) -> list[Batch[Choice]]:
        prefill = None if self._prefill is None else self._prefill.batch
        return [batch for batch in (self._running, prefill) if batch is not None]

    @property
    def is_idle(self) -> bool:
        return self._running is None and self._prefill is None

    @property
    def takes_prompts(self) -> bool:
        return self._prefill is None

    def fits(self, chosen: Sequence[Choice], candidate: Choice) -> bool:
        """May `candidate` start together with `chosen`, beside what is running?"""
        running = [] if self._running is None else [row for row in self._running.rows if row]
        everybody = [*running, *chosen, candidate]
        longest = max(choice.final_length for choice in everybody)
        prompt_columns = max(len(choice.prompt) for choice in (*chosen, candidate))
        return (
            len(everybody) <= self.limits.max_rows
            and (len(everybody) == 1 or len(everybody) * longest <= self.limits.cache_tokens)
            and (not chosen or (len(chosen) + 1) * prompt_columns <= self.limits.prefill_tokens)
        )

    def start(self, choices: Sequence[Choice]) -> None:
        """Begin with the prompts of these choices; needs `takes_prompts`."""
        self._prefill = Prefill(self.runner, choices, [choice.prompt for choice in choices])

    def turn(self) -> None:
        """One token for every running choice, then one chunk of prompts."""
        self._decode()
        self._advance_prefill()

    def drop(self, is_unwanted: Callable[[Choice], bool]) -> list[Choice]:
        """Remove the choices that nobody wants any more, and return them."""
        dropped = []
        for batch in self.batches:
            for index in batch.alive:
                choice = batch.rows[index]
                if choice is not None and is_unwanted(choice):
                    batch.remove(index)
                    dropped.append(choice)
        if self._running is not None:
            self._running = self._tidy(self._running)
        if self._prefill is not None:
            if self._prefill.batch.alive:
                self._prefill.drop_dead()
            else:
                self._prefill = None
        return dropped

    def fail_everything(self, error: ApiError) -> None:
        batches, self._running, self._prefill = self.batches, None, None
        for batch in batches:
            self._fail(batch, error)

    def _decode(self) -> None:
        batch = self._running
        if batch is None:
            return
        tokens = [0 if row is None else row.generated[-1] for row in batch.rows]
        try:
            logits_BV = batch.step(tokens)
        except Exception as error:
            self._running = None
            self._engine_failure([batch], error)
            return
        self._accept(batch, logits_BV)
        self._running = self._tidy(batch)

    def _tidy(self, batch: Batch[Choice]) -> Batch[Choice] | None:
        """The batch without its dead rows and spare columns, once they are worth a copy."""
        rows, alive = len(batch.rows), len(batch.alive)
        if not alive:
            return None
        worth = max(FEWEST_SPARE_COLUMNS, SPARE_SHARE * batch.columns)
        if batch.columns >= self.runner.max_context:
            worth = 1
        if rows - alive >= max(1, DEAD_SHARE * rows) or batch.spare_columns() >= worth:
            batch.compact()
        return batch

    def _accept(self, batch: Batch[Choice], logits_BV: np.ndarray) -> None:
        """Every living row draws its token; a row that cannot ends alone."""
        now_s = time.monotonic()
        for index in batch.alive:
            choice = batch.rows[index]
            assert choice is not None
            gap_s = now_s - choice.last_token_s if choice.generated else None
            try:
                delta = choice.accept(logits_BV[index, : self.limits.vocabulary], now_s)
            except Exception as error:
                traceback.print_exception(error, file=sys.stderr)
                delta = Delta(choice.index, error=engine_failed("no token could be drawn"))
            with self.metrics.lock:
                self.metrics.generated_tokens.add()
                if gap_s is not None:
                    self.metrics.between_tokens.observe(gap_s)
            if delta.is_last:
                batch.remove(index)
            self._put(choice, delta)

    def _advance_prefill(self) -> None:
        prefill = self._prefill
        if prefill is None:
            return
        columns = max(1, self.limits.prefill_tokens // len(prefill.batch.rows))
        if self.runner.max_new is not None:
            columns = min(columns, self.runner.max_new)
        try:
            logits_BV = prefill.advance(columns)
        except Exception as error:
            self._prefill = None
            self._engine_failure([prefill.batch], error)
            return
        if logits_BV is None:
            return
        self._prefill = None
        self._count_prompts(prefill.batch)
        self._accept(prefill.batch, logits_BV)
        if prefill.batch.alive:
            self._join(prefill.batch)

    def _count_prompts(self, batch: Batch[Choice]) -> None:
        now_s = time.monotonic()
        with self.metrics.lock:
            for choice in (row for row in batch.rows if row is not None):
                self.metrics.prompt_tokens.add(len(choice.prompt))
                self.metrics.first_token.observe(now_s - choice.submitted_s)

    def _join(self, batch: Batch[Choice]) -> None:
        running = self._running
        try:
            batch.compact()
            if running is not None:
                running.join(batch)
        except Exception as error:
            self._running = None
            self._engine_failure([batch] if running is None else [running, batch], error)
            return
        self._running = batch if running is None else running

    def _engine_failure(self, batches: Sequence[Batch[Choice]], error: Exception) -> None:
        """The caches are lost: these choices end with an error, all others go on."""
        rows = sum(len(batch.alive) for batch in batches)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"error: the engine failed on {rows} rows: {reason}", file=sys.stderr, flush=True)
        with self.metrics.lock:
            self.metrics.engine_failures.add()
        for batch in batches:
            self._fail(batch, engine_failed("the engine failed"))

    def _fail(self, batch: Batch[Choice], error: ApiError) -> None:
        for index in batch.alive:
            choice = batch.rows[index]
            assert choice is not None
            batch.remove(index)
            self._put(choice, Delta(choice.index, error=error))


def engine_failed(what: str) -> ApiError:
    return ApiError(
        500,
        f"{what} while this answer was generated; the server's log says why; try again",
        code="engine_failed",
    )
