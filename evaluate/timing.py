"""The one timing function: warm up, interleave the contenders, and keep every sample.

A round calls every contender once, starting with another one each time, so that drift of the clock
or the machine falls on all alike. Figures are medians with the 5th and 95th percentile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], Any]
SPIN_S = 0.05  # ONNX Runtime's idle threads spin for 28 ms after a call (measured, 2 threads)


@dataclass(frozen=True)
class Timed:
    """`call` is timed; `setup` runs before it, untimed, and its result is what `call` gets."""

    call: Callable[[Any], object]
    setup: Call = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of every timed call, in order."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return float(np.median(self.samples_s))

    @property
    def spread_s(self) -> tuple[float, float]:
        """5th and 95th percentile."""
        low, high = np.quantile(self.samples_s, [0.05, 0.95])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        low, high = self.spread_s
        return {
            "median_ms": 1e3 * self.median_s,
            "p5_ms": 1e3 * low,
            "p95_ms": 1e3 * high,
            "samples": len(self.samples_s),
        }


def interleaved_timings(
    contenders: Mapping[str, Timed],
    *,
    rounds: int,
    warmup: int = 1,
    pause_s: float = SPIN_S,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    on_call: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every contender `rounds` times after `warmup` untimed rounds.

    Args:
        pause_s: rest before each call, so that the threads of the one before stop spinning:
            while they do, they take a core from the next.
        synchronise: waits until the device is idle; called before the clock is read, both times.
        on_call: called after each call, for progress.

    Returns: timings, and the exceptions of those that failed, which are timed no further.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    failures: dict[str, Exception] = {}
    names = list(contenders)
    for number in range(warmup + rounds):
        for name in _rotated(names, number):
            if name in failures:
                continue
            time.sleep(pause_s)
            try:
                seconds = _seconds(contenders[name], synchronise, clock)
            except Exception as error:  # a contender may fail in any way; the others go on
                failures[name] = error
                continue
            if number >= warmup:
                samples[name].append(seconds)
            on_call()
    done = {n: Timing(tuple(s)) for n, s in samples.items() if n not in failures}
    return done, failures


def _rotated(names: Sequence[str], number: int) -> list[str]:
    start = number % len(names) if names else 0
    return [*names[start:], *names[:start]]


def _seconds(timed: Timed, synchronise: Callable[[], None], clock: Callable[[], float]) -> float:
    prepared = timed.setup()
    synchronise()
    began = clock()
    timed.call(prepared)
    synchronise()
    return clock() - began
