"""Timing of several contenders in turn, so that drift of the machine falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from deploy.runner import Runner

FIRST_TOKEN_ID = 5  # below are often special tokens


@dataclass(frozen=True)
class Workload:
    """`prompt` tokens processed, then `generated` ones decoded, for `batch` rows at a time."""

    prompt: int
    generated: int
    batch: int = 1

    @property
    def name(self) -> str:
        """pp512, tg128 or pp512+tg128, as llama-bench writes them."""
        parts = [f"pp{self.prompt}"] if self.prompt else []
        return "+".join([*parts, *([f"tg{self.generated}"] if self.generated else [])])

    @property
    def context(self) -> int:
        return self.prompt + self.generated

    @property
    def tokens(self) -> int:
        """Tokens of all rows, which the speed is quoted for."""
        return self.batch * self.context


def interleaved_samples(
    calls: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, `repetitions` of each after one that is not counted; each round
    starts with another contender."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repetitions + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began = clock()
            calls[name]()
            if number:
                samples[name].append(clock() - began)
    return samples


def run_test(runner: Runner, test: Workload) -> None:
    """Process a random prompt, then decode greedily. Without a prompt decoding starts from one
    token in an empty cache, as in llama-bench."""
    random = np.random.default_rng(0)
    shape = (test.batch, max(test.prompt, 1))
    ids_BS = random.integers(FIRST_TOKEN_ID, runner.vocabulary, shape)
    cache = runner.new_cache(test.batch)
    if test.prompt:
        step = runner.max_new or test.prompt
        for start in range(0, test.prompt, step):
            part_BS = ids_BS[:, start : start + step]
            logits_B1V = runner.forward(part_BS, cache, logits_to_keep=1)
        ids_BS = logits_B1V[:, -1].argmax(-1)[:, None]
    for _ in range(test.generated):
        logits_B1V = runner.forward(ids_BS, cache, logits_to_keep=1)
        ids_BS = logits_B1V[:, -1].argmax(-1)[:, None]
