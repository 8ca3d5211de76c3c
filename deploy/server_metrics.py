"""Figures of a running server in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "budgeted_lora_"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Counter:
    """Counts up, apart for every combination of label values."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = PREFIX + name, text, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1, *values: str) -> None:
        self._values[values] = self._values.get(values, 0.0) + amount

    def value(self, *values: str) -> float:
        return self._values.get(values, 0.0)

    def lines(self) -> list[str]:
        return [
            f"{self.name}{_braces(self.labels, values)} {_written(value)}"
            for values, value in sorted(self._values.items())
        ]


class Gauge(Counter):
    """A value that goes up and down."""

    kind = "gauge"

    def set(self, value: float) -> None:
        self._values[()] = float(value)


class Histogram:
    """Counts of observations, in seconds, up to each of some bounds."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds_s: Sequence[float]) -> None:
        self.name, self.text, self.bounds_s = PREFIX + name, text, tuple(bounds_s)
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds_s, seconds)] += times
        self._sum_s += seconds * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def lines(self) -> list[str]:
        written, below = [], 0
        for bound, count in zip((*self.bounds_s, math.inf), self._counts, strict=True):
            below += count
            written.append(f'{self.name}_bucket{{le="{_written(bound)}"}} {below}')
        return [*written, f"{self.name}_sum {self._sum_s!r}", f"{self.name}_count {below}"]


class Metrics:
    """All figures of one server. Hold `lock` while several are changed together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests = Counter("requests_total", "HTTP requests answered.", ("endpoint", "status"))
        self.finished = Counter(
            "choices_finished_total", "Choices that ended, by reason.", ("reason",)
        )
        self.prompt_tokens = Counter("prompt_tokens_total", "Prompt tokens processed.")
        self.generated_tokens = Counter("generated_tokens_total", "Tokens generated.")
        self.engine_failures = Counter("engine_failures_total", "Engine calls that failed.")
        self.running = Gauge("choices_running", "Choices being generated.")
        self.waiting = Gauge("choices_waiting", "Choices in the queue.")
        self.cache_tokens = Gauge("cache_tokens", "Rows times columns of the key/value cache.")
        self.memory = Gauge("resident_memory_bytes", "Resident memory of the server process.")
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the queue to the first token.", FIRST_TOKEN_S
        )
        self.between_tokens = Histogram(
            "time_between_tokens_seconds", "Between a choice's tokens.", BETWEEN_TOKENS_S
        )
        self.duration = Histogram(
            "choice_duration_seconds", "From the queue to the last token.", REQUEST_S
        )

    def text(self) -> str:
        """The page that Prometheus fetches."""
        with self.lock:
            lines = []
            for metric in vars(self).values():
                if isinstance(metric, (Counter, Histogram)):
                    lines.append(f"# HELP {metric.name} {metric.text}")
                    lines.append(f"# TYPE {metric.name} {metric.kind}")
                    lines += metric.lines()
        return "\n".join(lines) + "\n"


def _braces(labels: Sequence[str], values: Sequence[str]) -> str:
    if not labels:
        return ""
    pairs = zip(labels, map(_escaped, values), strict=True)
    return "{" + ",".join(f'{label}="{value}"' for label, value in pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _written(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
