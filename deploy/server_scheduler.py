"""Continuous batching: one thread owns the engine; choices join and leave between its steps."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from deploy.runner import Runner
from deploy.server_choice import Choice, Delta
from deploy.server_engine import Engine, EngineLimits, engine_failed
from deploy.server_errors import ApiError
from deploy.server_metrics import Metrics

Deliver = Callable[[list[tuple[Choice, Delta]]], None]

LONGEST_RETRY_S = 30
SMOOTHING = 0.1


class Scheduler(threading.Thread):
    """Queues choices and feeds one engine with them.

    Args:
        max_waiting: choices that the queue holds.
        deliver: gets the deltas of each turn, on this thread; it must not block.
    """

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        metrics: Metrics,
        *,
        max_waiting: int,
        deliver: Deliver,
    ) -> None:
        super().__init__(name="scheduler", daemon=True)
        self.limits = limits
        self.metrics = metrics
        self.max_waiting = max_waiting
        self._deliver = deliver
        self._engine = Engine(runner, limits, metrics, self._put)
        self._changed = threading.Condition()
        self._waiting: deque[Choice] = deque()
        self._outbox: list[tuple[Choice, Delta]] = []
        self._is_draining = False
        self._is_stopping = False
        self._mean_duration_s = 1.0

    def submit(self, choices: Sequence[Choice]) -> None:
        """Queue choices, all or none.

        Raises: ApiError 429 when the queue is full, 503 when the server is shutting down.
        """
        with self._changed:
            if self._is_draining:
                raise shutting_down()
            if len(self._waiting) + len(choices) > self.max_waiting:
                raise self._queue_full()
            self._waiting.extend(choices)
            self._changed.notify()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """Stop generating choices that nobody reads any more."""
        with self._changed:
            for choice in choices:
                choice.is_cancelled = True
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new choices and those in the queue; go on with the ones that have begun."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def stop(self) -> None:
        """End what is still running with an error; the thread then ends."""
        with self._changed:
            self._is_draining = self._is_stopping = True
            self._changed.notify()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_idle(self) -> bool:
        """Nothing waits, nothing runs, everything was delivered."""
        with self._changed:
            return not self._waiting and not self._outbox and self._engine.is_idle

    def run(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception:  # an error of ours: these choices fail, later ones are served
                traceback.print_exc(file=sys.stderr)
                self._engine.fail_everything(engine_failed("an internal error happened"))
            self._send()
        self._engine.fail_everything(shutting_down())
        self._refuse(lambda _: True, shutting_down())
        self._send()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._is_stopping or self._waiting) and self._engine.is_idle:
                self._changed.wait()
            return not self._is_stopping

    def _turn(self) -> None:
        for choice in self._engine.drop(lambda choice: choice.is_cancelled):
            self._count_end("cancelled", choice)
        self._thin_queue()
        if self._engine.takes_prompts:
            self._admit()
        self._engine.turn()

    def _thin_queue(self) -> None:
        """Take out of the queue what was cancelled, has waited too long, or comes too late."""
        with self._changed:
            gone = [choice for choice in self._waiting if choice.is_cancelled]
            self._waiting = deque(c for c in self._waiting if not c.is_cancelled)
        for choice in gone:
            self._count_end("cancelled", choice)
        now_s = time.monotonic()
        self._refuse(lambda choice: now_s >= choice.deadline_s, waited_too_long())
        if self._is_draining:
            self._refuse(lambda _: True, shutting_down())

    def _refuse(self, is_refused: Callable[[Choice], bool], error: ApiError) -> None:
        with self._changed:
            refused = [choice for choice in self._waiting if is_refused(choice)]
            self._waiting = deque(c for c in self._waiting if not is_refused(c))
            for choice in refused:
                self._put(choice, Delta(choice.index, error=error))

    def _admit(self) -> None:
        """Start the prompts at the head of the queue, in their order, as far as they fit."""
        with self._changed:
            chosen: list[Choice] = []
            while self._waiting and self._engine.fits(chosen, self._waiting[0]):
                chosen.append(self._waiting.popleft())
            if chosen:
                self._engine.start(chosen)

    def _put(self, choice: Choice, delta: Delta) -> None:
        if delta.text or delta.is_last:
            self._outbox.append((choice, delta))
        if delta.is_last:
            self._count_end(delta.finish or "error", choice)

    def _count_end(self, reason: str, choice: Choice) -> None:
        duration_s = time.monotonic() - choice.submitted_s
        self._mean_duration_s += SMOOTHING * (duration_s - self._mean_duration_s)
        with self.metrics.lock:
            self.metrics.finished.add(1, reason)
            self.metrics.duration.observe(duration_s)

    def _send(self) -> None:
        with self.metrics.lock:
            batches = self._engine.batches
            self.metrics.running.set(sum(len(batch.alive) for batch in batches))
            self.metrics.cache_tokens.set(sum(len(b.rows) * b.columns for b in batches))
            self.metrics.waiting.set(len(self._waiting))
        if self._outbox:
            self._deliver(self._outbox)
            self._outbox = []

    def _queue_full(self) -> ApiError:
        rounds = len(self._waiting) / self.limits.max_rows
        seconds = math.ceil(rounds * self._mean_duration_s)
        return ApiError(
            429,
            f"{len(self._waiting)} choices are waiting; the queue holds {self.max_waiting}; "
            "try again later",
            code="queue_full",
            retry_after_s=max(1, min(LONGEST_RETRY_S, seconds)),
        )


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; send the request to another one or try again later",
        code="shutting_down",
        retry_after_s=10,
    )


def waited_too_long() -> ApiError:
    return ApiError(
        503,
        "the request waited in the queue for as long as a request may take; try again later",
        code="timeout",
        retry_after_s=LONGEST_RETRY_S,
    )
