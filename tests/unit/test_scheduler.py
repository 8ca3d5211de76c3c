"""The scheduler alone: batching changes no answer, and no row's fate touches another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from deploy.sampling import Sampler, SamplingSettings
from deploy.server_batch import Batch, Prefill
from deploy.server_choice import Choice, Delta, token_logprob
from deploy.server_engine import EngineLimits
from deploy.server_errors import ApiError
from deploy.server_metrics import Metrics
from deploy.server_scheduler import Scheduler
from deploy.text import StopStrings
from tests.server_fakes import VOCABULARY, FakeRunner

WIDE = EngineLimits(max_rows=8, cache_tokens=10**6, prefill_tokens=16, vocabulary=VOCABULARY)


class Spelled:
    """Token 5 reads "<5>"."""

    def push(self, token: int) -> str:
        return f"<{token}>"

    def flush(self) -> str:
        return ""


class Inbox:
    """Collects one choice's deltas."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ended = threading.Event()

    def put(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.is_last:
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def make_choice(
    prompt: tuple[int, ...],
    max_new: int = 12,
    stops: tuple[str, ...] = (),
    seconds: float = 60.0,
    sampler: Any = None,
    **changes: Any,
) -> Choice:
    values: dict[str, Any] = {
        "index": 0,
        "prompt": prompt,
        "max_new": max_new,
        "sampler": sampler or Sampler(SamplingSettings(temperature=0)),
        "detokenizer": Spelled(),
        "stops": StopStrings(stops),
        "end_tokens": (),
        "top_logprobs": None,
        "sink": Inbox(),
        "deadline_s": time.monotonic() + seconds,
    }
    return Choice(**{**values, **changes})


@pytest.fixture
def start() -> Iterator[Callable[..., Scheduler]]:
    """`start(runner, limits, max_waiting=…)`: a scheduler that runs until the test ends."""
    running: list[Scheduler] = []

    def started(
        runner: Any, limits: EngineLimits = WIDE, max_waiting: int = 1000, begin: bool = True
    ) -> Scheduler:
        def deliver(deltas: list[tuple[Choice, Delta]]) -> None:
            for choice, delta in deltas:
                choice.sink.put(delta)

        scheduler = Scheduler(runner, limits, Metrics(), max_waiting=max_waiting, deliver=deliver)
        running.append(scheduler)
        if begin:
            scheduler.start()
        return scheduler

    yield started
    for scheduler in running:
        scheduler.stop()
        if scheduler.ident is not None:
            scheduler.join(10)
            assert not scheduler.is_alive()


def alone(prompt: tuple[int, ...], max_new: int) -> list[int]:
    """Greedy continuation by the definition: one row, whole prompt, no cache tricks."""
    runner, ids = FakeRunner(), list(prompt)
    for _ in range(max_new):
        array = np.array(ids)
        ids.append(int(runner._logits(array, np.arange(len(ids))).argmax()))
    return ids[len(prompt) :]


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    return [tuple(random.integers(3, VOCABULARY, length).tolist()) for length in lengths]


def finish_all(choices: list[Choice], seconds: float = 30.0) -> None:
    for choice in choices:
        assert choice.sink.ended.wait(seconds)


def test_batched_answers_are_those_of_each_prompt_alone(start: Callable[..., Scheduler]) -> None:
    runner = FakeRunner(step_s=0.0005)
    scheduler = start(runner)
    choices = [
        make_choice(prompt, max_new=1 + 7 * index % 30) for index, prompt in enumerate(prompts(40))
    ]
    for first in range(0, 40, 5):
        scheduler.submit(choices[first : first + 5])
        time.sleep(0.003)
    finish_all(choices)
    for choice in choices:
        assert choice.generated == alone(choice.prompt, choice.max_new)
    assert max(batch for batch, _ in runner.shapes) == WIDE.max_rows
    assert max(new for _, new in runner.shapes) <= WIDE.prefill_tokens
    assert scheduler.metrics.finished.value("length") == 40
    total = sum(choice.max_new for choice in choices)
    assert scheduler.metrics.generated_tokens.value() == total
    assert scheduler.metrics.first_token.count == 40
    assert scheduler.metrics.between_tokens.count == total - 40


def test_the_comparison_notices_wrong_columns(
    start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin of the test above: a batch that trims one column too many gives other answers."""
    spare = Batch.spare_columns
    monkeypatch.setattr(Batch, "spare_columns", lambda self: min(spare(self) + 1, 1))
    scheduler = start(FakeRunner())
    choices = [make_choice(prompt, max_new=4 + 2 * i) for i, prompt in enumerate(prompts(12))]
    scheduler.submit(choices)
    finish_all(choices)
    assert any(choice.generated != alone(choice.prompt, choice.max_new) for choice in choices)


def test_a_long_prompt_does_not_starve_running_choices(start: Callable[..., Scheduler]) -> None:
    runner = FakeRunner(step_s=0.002)
    scheduler = start(runner)
    short = make_choice((5, 6, 7), max_new=200)
    scheduler.submit([short])
    while len(short.generated) < 5:
        time.sleep(0.001)
    before = len(short.generated)
    long = make_choice(tuple(range(3, 203)), max_new=3)
    scheduler.submit([long])
    assert long.sink.ended.wait(20)
    chunks = [shape for shape in runner.shapes if shape[1] > 1]
    assert len(chunks) >= 200 // WIDE.prefill_tokens
    assert len(short.generated) - before >= len(chunks) - 3
    assert not short.sink.ended.is_set() or len(short.generated) == 200


def test_engine_limits_of_batch_and_columns_are_kept(start: Callable[..., Scheduler]) -> None:
    runner = FakeRunner(max_batch=3, max_new=5, max_context=70)  # FakeRunner asserts all three
    limits = EngineLimits(3, 10**6, 16, VOCABULARY)
    scheduler = start(runner, limits)
    choices = [make_choice(prompt, 70 - len(prompt)) for prompt in prompts(20, seed=3)]
    scheduler.submit(choices)
    finish_all(choices)
    assert scheduler.metrics.engine_failures.value() == 0
    for choice in choices:
        assert choice.generated == alone(choice.prompt, choice.max_new)


def test_the_cache_stays_below_its_limit(start: Callable[..., Scheduler]) -> None:
    limits = EngineLimits(max_rows=8, cache_tokens=100, prefill_tokens=64, vocabulary=VOCABULARY)
    runner = FakeRunner()
    scheduler = start(runner, limits)
    choices = [make_choice((9,) * 10, max_new=30) for _ in range(6)]
    scheduler.submit(choices)
    finish_all(choices)
    assert max(batch for batch, _ in runner.shapes) == 2  # 3 rows of 40 tokens exceed 100


def test_a_choice_that_ends_is_dropped_while_others_go_on(
    start: Callable[..., Scheduler],
) -> None:
    runner = FakeRunner()
    scheduler = start(runner)
    prompt = (11, 12, 13)
    expected = alone(prompt, 40)
    by_token = make_choice(prompt, 40, end_tokens=(expected[4],))
    by_text = make_choice(prompt, 40, stops=(f"<{expected[6]}>",))
    whole = make_choice(prompt, 40)
    scheduler.submit([by_token, by_text, whole])
    finish_all([by_token, by_text, whole])
    spelled = [f"<{token}>" for token in expected]
    assert by_token.sink.text == "".join(spelled[: expected.index(expected[4])])
    assert by_text.sink.text == "".join(spelled[: expected.index(expected[6])])
    assert whole.sink.text == "".join(spelled)
    assert by_token.sink.deltas[-1].finish == by_text.sink.deltas[-1].finish == "stop"
    assert whole.sink.deltas[-1].finish == "length"
    assert runner.shapes[-1] == (1, 1)


def test_a_full_queue_refuses_with_a_time_to_retry(start: Callable[..., Scheduler]) -> None:
    scheduler = start(FakeRunner(), max_waiting=4, begin=False)
    scheduler.submit([make_choice((3,)) for _ in range(3)])
    with pytest.raises(ApiError) as refused:
        scheduler.submit([make_choice((3,)) for _ in range(2)])
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    scheduler.submit([make_choice((3,))])  # all or none: one place is still free


def test_cancelled_choices_leave_queue_prompt_and_batch(start: Callable[..., Scheduler]) -> None:
    runner = FakeRunner(step_s=0.002)
    limits = EngineLimits(max_rows=2, cache_tokens=10**6, prefill_tokens=8, vocabulary=VOCABULARY)
    scheduler = start(runner, limits)
    running, kept = make_choice((4, 5), 400), make_choice((6, 7), 60)
    scheduler.submit([running, kept])
    while len(kept.generated) < 3:
        time.sleep(0.001)
    queued = make_choice((8, 9), 400)
    scheduler.submit([queued])
    scheduler.cancel([queued, running])
    prompted = make_choice(tuple(range(3, 300)), 5)
    scheduler.submit([prompted])
    time.sleep(0.02)
    scheduler.cancel([prompted])
    finish_all([kept])
    assert kept.generated == alone((6, 7), 60)
    assert not (running.sink.ended.is_set() or queued.sink.deltas or prompted.sink.deltas)
    until = time.monotonic() + 5
    while not scheduler.is_idle and time.monotonic() < until:
        time.sleep(0.005)
    assert scheduler.is_idle
    assert scheduler.metrics.finished.value("cancelled") == 3


def test_a_sampler_that_fails_ends_its_own_row_only(
    start: Callable[..., Scheduler], capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def next(self, logits_V: np.ndarray, generated_ids: Any) -> int:
            raise ValueError("no finite logit")

    scheduler = start(FakeRunner())
    bad, good = make_choice((3, 4), sampler=Broken()), make_choice((5, 6), 20)
    scheduler.submit([bad, good])
    finish_all([bad, good])
    error = bad.sink.deltas[-1].error
    assert error is not None and error.status == 500
    assert good.generated == alone((5, 6), 20)
    assert "no finite logit" in capfd.readouterr().err


def test_an_engine_failure_ends_its_batch_and_the_next_is_served(
    start: Callable[..., Scheduler], capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = start(FakeRunner(fails_on=77))
    bad = make_choice((77, 3))
    scheduler.submit([bad])
    finish_all([bad])
    assert bad.sink.deltas[-1].error.status == 500
    assert scheduler.metrics.engine_failures.value() == 1
    assert "the fake engine broke" in capfd.readouterr().err
    good = make_choice((5, 6), 20)
    scheduler.submit([good])
    finish_all([good])
    assert good.generated == alone((5, 6), 20)


def test_time_limits_cut_a_running_choice_and_refuse_a_waiting_one(
    start: Callable[..., Scheduler],
) -> None:
    limits = EngineLimits(max_rows=1, cache_tokens=10**6, prefill_tokens=8, vocabulary=VOCABULARY)
    scheduler = start(FakeRunner(step_s=0.005), limits)
    cut, late = make_choice((3,), 10**4, seconds=0.3), make_choice((4,), seconds=0.1)
    scheduler.submit([cut, late])
    finish_all([cut, late])
    assert cut.sink.deltas[-1].finish == "length" and 5 < len(cut.generated) < 100
    assert late.sink.deltas[-1].error.status == 503 and not late.generated


def test_draining_refuses_the_queue_and_finishes_what_runs(
    start: Callable[..., Scheduler],
) -> None:
    limits = EngineLimits(max_rows=1, cache_tokens=10**6, prefill_tokens=8, vocabulary=VOCABULARY)
    scheduler = start(FakeRunner(step_s=0.002), limits)
    running, waiting = make_choice((3, 4), 50), make_choice((5,), 50)
    scheduler.submit([running, waiting])
    while len(running.generated) < 3:
        time.sleep(0.001)
    scheduler.drain()
    finish_all([waiting, running])
    assert waiting.sink.deltas[-1].error.code == "shutting_down"
    assert running.generated == alone((3, 4), 50)
    with pytest.raises(ApiError) as refused:
        scheduler.submit([make_choice((6,))])
    assert refused.value.status == 503


def test_stopping_ends_what_runs_with_an_error(start: Callable[..., Scheduler]) -> None:
    scheduler = start(FakeRunner(step_s=0.002))
    running = make_choice((3, 4), 10**4)
    scheduler.submit([running])
    while len(running.generated) < 3:
        time.sleep(0.001)
    scheduler.stop()
    finish_all([running])
    assert running.sink.deltas[-1].error.code == "shutting_down"


def test_ids_beyond_the_tokenizer_are_never_drawn(start: Callable[..., Scheduler]) -> None:
    limits = EngineLimits(max_rows=2, cache_tokens=10**6, prefill_tokens=8, vocabulary=10)
    scheduler = start(FakeRunner(), limits)
    choice = make_choice((3, 4), 50)
    scheduler.submit([choice])
    finish_all([choice])
    assert max(choice.generated) < 10


def test_compaction_drops_dead_rows_and_shared_padding() -> None:
    runner = FakeRunner()
    batch = Prefill(runner, ["long", "short"], [[3] * 20, [4] * 6])
    assert batch.advance(100) is not None
    rows = batch.batch
    assert rows.columns == 20 and rows.spare_columns() == 0
    rows.remove(0)
    assert rows.spare_columns() == 14
    rows.compact()
    assert rows.rows == ["short"] and rows.columns == 6 and rows.mask_BT.all()
    assert rows.cache.ids_BT.tolist() == [[4] * 6]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1e30], np.float32)
    found = token_logprob(logits, 1, 9)
    wanted = np.log(np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum())
    assert found.logprob == pytest.approx(wanted[1])
    assert [token for token, _ in found.top] == [2, 1, 0, 3]
    assert found.top[-1][1] == -9999.0
