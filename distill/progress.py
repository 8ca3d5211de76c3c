"""How far a stage is, how fast of late, and when it will end; `distill.console` shows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from distill.units import duration, number, rate

SPEED_WINDOW_S = 60.0
SPEED_MIN_UPDATES = 4
FIELD_LABELS = {"kl": "KL", "macs_fraction": "MACs"}

Clock = Callable[[], float]


class Speed:
    """Recent speed: over the last minute, or the last four updates where those are rarer.

    The clock starts with the first update, so that neither a warm-up nor work that a resumed run
    finds done counts as speed.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()
        self._first: tuple[float, float] | None = None

    def add(self, now_s: float, done: float) -> None:
        """Note that `done` units in all are finished at `now_s` seconds."""
        self._first = self._first or (now_s, done)
        self._recent.append((now_s, done))
        while len(self._recent) > SPEED_MIN_UPDATES and self._recent[1][0] < now_s - SPEED_WINDOW_S:
            self._recent.popleft()

    def recent(self) -> float | None:
        """Units per second of late; None before two updates."""
        return _slope(self._recent[0], self._recent[-1]) if self._recent else None

    def mean(self) -> float | None:
        """Units per second since the first update; None before two updates."""
        return _slope(self._first, self._recent[-1]) if self._first else None


class Progress:
    """State of one stage of `total` units (None: unknown); `clock` gives seconds."""

    def __init__(self, total: int | None, title: str, unit: str, clock: Clock) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done = 0
        self.on_change: Callable[[], None] | None = None
        self._fields: dict[str, object] = {}
        self._speed = Speed()
        self._clock = clock
        self._start_s = clock()

    def update(self, advance: int = 1, **fields: object) -> None:
        """`advance` more units are done; `fields` (loss=…, kl=…) replace those shown so far."""
        self.done += advance
        self._fields = {**self._fields, **fields}
        self._speed.add(self._clock(), self.done)
        if self.on_change is not None:
            self.on_change()

    @property
    def fraction(self) -> float | None:
        """Share of the total that is done, at most 1; None when the total is unknown."""
        return min(self.done / self.total, 1.0) if self.total else None

    def eta_s(self) -> float | None:
        """Seconds left at the recent speed; None when the total or the speed is unknown."""
        speed = self._speed.recent()
        if not self.total or not speed:
            return None
        return max(self.total - self.done, 0) / speed

    def amount(self) -> str:
        """For example "51,200 of 102,400 tokens"."""
        of = f" of {number(self.total)}" if self.total else ""
        return f"{number(self.done)}{of} {self.unit}"

    def pace(self) -> str:
        """For example "154 tokens/s  ETA 5m 32s"."""
        speed, eta_s = self._speed.recent(), self.eta_s()
        eta = "" if eta_s is None else f"ETA {duration(eta_s)}"
        return joined("" if speed is None else rate(speed, self.unit), eta)

    def fields(self) -> str:
        """For example "step 25  loss 2.315  KL 1.2"."""
        return joined(*(f"{_label(k)} {number(v)}" for k, v in self._fields.items()))

    def line(self) -> str:
        """Where the stage stands, in one line."""
        share = "" if self.fraction is None else f"{self.fraction:.0%}"
        return joined(f"{self.title}:", share, self.amount(), self.pace(), self.fields())

    def last_line(self, finished: bool) -> str:
        """What remains on the screen when the stage has ended or was stopped."""
        speed, took = self._speed.mean(), duration(self._clock() - self._start_s)
        return joined(
            f"{self.title}:",
            f"{number(self.done)} {self.unit} in {took}"
            if finished
            else f"stopped at {self.amount()} after {took}",
            "" if speed is None else rate(speed, self.unit),
            self.fields(),
        )


def joined(*parts: str) -> str:
    """The parts that are not empty, two spaces apart."""
    return "  ".join(part for part in parts if part)


def _slope(first: tuple[float, float], last: tuple[float, float]) -> float | None:
    elapsed_s = last[0] - first[0]
    return (last[1] - first[1]) / elapsed_s if elapsed_s > 0 else None


def _label(field: str) -> str:
    return FIELD_LABELS.get(field, field.replace("_", " "))
