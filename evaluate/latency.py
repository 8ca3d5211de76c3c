"""Time to first token, prefill and decode speed of every contender, interleaved.

Every figure is a median over rounds with its 5th and 95th percentile, and carries the fraction of
its ceiling: the least time that the measured memory bandwidth and matmul rate allow, ÷ the time
taken. Tokenising is not timed; the head runs on a prompt's last position only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.ceilings import BYTES_PER_WEIGHT, MeasuredCeilings, Work
from evaluate.contenders import Contender
from evaluate.runners import Runner, greedy_step, prefill
from evaluate.timing import Timed, Timing, interleaved_timings

GGUF_BYTES_PER_WEIGHT = {"Q4_0": 0.5625, "Q4_1": 0.625, "Q8_0": 1.0625, "F16": 2.0}


@dataclass(frozen=True)
class Scenario:
    """One thing to time. Prefill: `batch` prompts of `prompt` tokens. Decode: `steps` tokens each
    behind such prompts."""

    kind: str
    batch: int
    prompt: int
    steps: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-b{self.batch}-p{self.prompt}"

    @property
    def tokens(self) -> int:
        """Tokens that one timed call computes."""
        return self.batch * (self.steps if self.kind == "decode" else self.prompt)


def scenarios(
    prompt_lengths: Sequence[int], batch_sizes: Sequence[int], steps: int
) -> list[Scenario]:
    """Every prompt length at batch 1; larger batches at the shortest prompt."""
    shapes = [(1, length) for length in prompt_lengths]
    shapes += [(batch, min(prompt_lengths)) for batch in batch_sizes if batch > 1]
    prefills = [Scenario("prefill", batch, prompt) for batch, prompt in shapes]
    return prefills + [Scenario("decode", batch, prompt, steps) for batch, prompt in shapes]


def time_contenders(
    runners: Mapping[str, Runner],
    contenders: Mapping[str, Contender],
    todo: Sequence[Scenario],
    ceilings: Mapping[str, MeasuredCeilings],
    *,
    rounds: int,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    on_call: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Exception]]:
    """Rows by contender id, one a scenario; and what failed, by id. `ceilings` by device."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    failed: dict[str, Exception] = {}
    for scenario in todo:
        fitting = {
            name: timed_scenario(runner, scenario)
            for name, runner in runners.items()
            if name not in failed and fits(runner, scenario)
        }
        timings, failures = interleaved_timings(
            fitting, rounds=rounds, synchronise=synchronise, clock=clock, on_call=on_call
        )
        failed |= failures
        for name, timing in timings.items():
            rows[name].append(figures(scenario, timing, contenders[name], ceilings))
    return rows, failed


def fits(runner: Runner, scenario: Scenario) -> bool:
    """Whether the engine takes this many tokens and rows."""
    rows = getattr(runner, "max_batch", None) or scenario.batch
    return runner.max_context >= scenario.prompt + scenario.steps and rows >= scenario.batch


def timed_scenario(runner: Runner, scenario: Scenario) -> Timed:
    """The call that is timed; decoding starts each time from a copy of one prompt's cache."""
    generator = np.random.default_rng(scenario.prompt)
    shape = (scenario.batch, scenario.prompt)
    ids = generator.integers(5, runner.vocabulary - 1, shape).astype(np.int64)
    if scenario.kind == "prefill":
        return Timed(lambda _: prefill(runner, ids))

    def decode(prepared: tuple[np.ndarray, Any]) -> None:
        token, cache = prepared
        for _ in range(scenario.steps):
            token = greedy_step(runner, token, cache)

    prompt: list[tuple[np.ndarray, Any]] = []

    def start() -> tuple[np.ndarray, Any]:
        if not prompt:
            logits_B1V, cache = prefill(runner, ids)
            prompt.append((logits_B1V[:, -1].argmax(-1)[:, None].astype(np.int64), cache))
        token, cache = prompt[0]
        return token, cache.select(range(scenario.batch))

    return Timed(decode, start)


def figures(
    scenario: Scenario,
    timing: Timing,
    contender: Contender,
    ceilings: Mapping[str, MeasuredCeilings],
) -> dict[str, Any]:
    """Milliseconds, tokens per second and fraction of the ceiling of one timing."""
    low, high = timing.spread_s
    row: dict[str, Any] = {
        "scenario": scenario.name,
        "kind": scenario.kind,
        "batch": scenario.batch,
        "prompt_tokens": scenario.prompt,
        "decoded_tokens": scenario.steps,
        **timing.to_json(),
        "tokens_per_s": scenario.tokens / timing.median_s,
        "tokens_per_s_p5": scenario.tokens / high,
        "tokens_per_s_p95": scenario.tokens / low,
    }
    device = "cpu" if contender.provider == "cpu" else "cuda"
    if device in ceilings:
        floor_s, bound = floor_seconds(scenario, contender, ceilings[device])
        row |= {"ceiling_fraction": floor_s / timing.median_s, "bound": bound}
        row["ceiling_tokens_per_s"] = scenario.tokens / floor_s
    return row


def floor_seconds(
    scenario: Scenario, contender: Contender, ceilings: MeasuredCeilings
) -> tuple[float, str]:
    """The least time a scenario can take, and what bounds it: "memory" or "matmul".

    A pass reads every weight once and computes 2 operations a MAC; the head works on one position
    a row in a prefill.
    """
    passes = scenario.steps if scenario.kind == "decode" else 1
    size = (BYTES_PER_WEIGHT | GGUF_BYTES_PER_WEIGHT).get(contender.precision, 4.0)
    macs = contender.target_macs, contender.head_macs
    work = Work(*macs, size * sum(macs))
    seconds, bound = work.floor_s(
        ceilings, contender.precision, tokens=scenario.tokens // passes, rows=scenario.batch
    )
    return passes * seconds, bound
