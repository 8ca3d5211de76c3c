"""Charts of the report as inline SVG: Pareto plots, the probe chart and the module map.

Colours are Okabe and Ito's; shape and fill say the same again, so nothing hangs on colour alone.
Marks carry the JSON pointers of what they show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from evaluate.report.figures import Figures, pointer

INK, GREY, GRID = "#222222", "#666666", "#dddddd"
COLOURS = {
    "dense": INK,
    "lora": "#CC79A7",
    "budgeted": "#0072B2",
    "svd": "#E69F00",
    "peer": "#009E73",
}
SHAPES = {
    "dense": "square", "lora": "diamond", "budgeted": "circle", "svd": "triangle", "peer": "cross",
}  # fmt: skip
WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44
LABEL_WIDTH, LABEL_HEIGHT = 6.2, 12
OFFSETS = ((9, 4), (9, -7), (9, 15), (-9, 4), (-9, -7), (-9, 15), (9, 26), (-9, 26), (9, -18))


@dataclass(frozen=True)
class Axis:
    """One axis: `low` to `high` over `start` to `end` pixels, logarithmic or not."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Pixels of a value."""
        low, high, value = (self._scale(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values between both ends."""
        if self.log:
            return [t for t in _log_ticks(self.low, self.high) if self.low <= t <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value


@dataclass(frozen=True)
class Point:
    """One contender in a scatter plot: its place in `contenders`, and pointers of x and y."""

    place: int
    x_path: tuple[str | int, ...]
    y_path: tuple[str | int, ...]


def axis_over(
    values: Sequence[float], start: float, end: float, *, log: bool, zero: bool = False
) -> Axis:
    """An axis with a margin around the values."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.12, 1.15)
        return Axis(low / room, high * room, start, end, True)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if zero else low - room, high + room, start, end, False)


def scatter(
    figures: Figures, points: Sequence[Point], x_label: str, y_label: str, *, high_is_better: bool
) -> str:
    """A log-x scatter plot with its Pareto front; y is logarithmic unless high is better."""
    xs = [float(figures.value(*p.x_path)) for p in points]
    ys = [float(figures.value(*p.y_path)) for p in points]
    x_axis = axis_over(xs, LEFT, WIDTH - RIGHT, log=True)
    y_axis = axis_over(
        ys, HEIGHT - BOTTOM, TOP, log=not high_is_better, zero=high_is_better
    )  # fmt: skip
    fast_is_right = "tokens/s" in x_label
    front = _front(xs, ys, fast_is_right, high_is_better)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    line = " ".join(f"{x_axis.at(xs[i]):.1f},{y_axis.at(ys[i]):.1f}" for i in front)
    parts.append(f'<polyline points="{line}" class="front"/>')
    taken: list[tuple[float, float, float, float]] = [
        (x_axis.at(x) - 5, y_axis.at(y) - 5, x_axis.at(x) + 5, y_axis.at(y) + 5)
        for x, y in zip(xs, ys, strict=True)
    ]
    for point, x, y in zip(points, xs, ys, strict=True):
        parts.append(_mark(figures, point, x_axis.at(x), y_axis.at(y)))
        parts.append(_label(figures, point, x_axis.at(x), y_axis.at(y), taken))
    axes = (
        f'data-x-low="{x_axis.low!r}" data-x-high="{x_axis.high!r}" '
        f'data-y-low="{y_axis.low!r}" data-y-high="{y_axis.high!r}" '
        f'data-y-log="{str(y_axis.log).lower()}"'
    )
    name = escape(f"{y_label} against {x_label}")
    return (
        f'<svg class="scatter" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
        f"{axes}>{''.join(parts)}</svg>"
    )


def probe_chart(figures: Figures, places: Sequence[int], tasks: Sequence[str], shots: str) -> str:
    """One row a task: HITS@1 of each contender as a mark on a line from 0 to 1."""
    row, left, width = 22, 150, 640
    height = row * len(tasks) + 40
    x_axis = Axis(0.0, 1.0, left, width - 20, False)
    parts = []
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - 32}" class="grid"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 18}" class="tick fixed" text-anchor="middle">'
            f"{tick:.0%}</text>"
        )
    for number, task in enumerate(tasks):
        y = 16 + row * number
        parts.append(
            f'<text x="{left - 8}" y="{y + 4}" class="name fixed" text-anchor="end">'
            f"{escape(task)}</text>"
            f'<line x1="{left}" x2="{width - 20}" y1="{y}" y2="{y}" class="grid"/>'
        )
        for place in places:
            path = ("contenders", place, "probes", "by_shots", shots, "tasks", task, "hits_at_1")
            value = figures.value(*path)
            if value is not None:
                title = escape(f"{figures.value('contenders', place, 'label')}, {task}")
                parts.append(
                    f'<g data-mark-path="{escape(pointer(*path))}" data-mark-x='
                    f'"{x_axis.at(value):.2f}"><title>{title}</title>'
                    f"{_shape(figures, place, x_axis.at(value), y, 5)}</g>"
                )
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 3}" class="axis fixed" text-anchor="middle">'
        "HITS@1 (fraction of queries)</text>"
    )
    return (
        f'<svg class="wide" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="accuracy by task">{"".join(parts)}</svg>'
    )


def key_mark(figures: Figures, place: int) -> str:
    """A contender's mark for a legend or table."""
    return f'<svg class="key" viewBox="0 0 14 14">{_shape(figures, place, 7, 7, 5)}</svg>'


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" class="tick fixed" '
            f'text-anchor="middle">{_short(tick)}</text>'
        )
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick fixed" text-anchor="end">'
            f"{_short(tick)}</text>"
        )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{middle_x}" y="{HEIGHT - 8}" class="axis fixed" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text x="14" y="{middle_y}" class="axis fixed" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle_y})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _mark(figures: Figures, point: Point, x: float, y: float) -> str:
    title = escape(str(figures.value("contenders", point.place, "label")))
    return (
        f'<g data-x-path="{escape(pointer(*point.x_path))}" '
        f'data-y-path="{escape(pointer(*point.y_path))}" data-x="{x:.2f}" data-y="{y:.2f}">'
        f"<title>{title}</title>{_shape(figures, point.place, x, y, 5)}</g>"
    )


def _shape(figures: Figures, place: int, x: float, y: float, r: float) -> str:
    """The mark of a method; hollow where the weights are quantised."""
    group = str(figures.value("contenders", place, "group"))
    hollow = figures.value("contenders", place, "precision") not in ("fp32", "fp16", "bf16")
    colour = COLOURS[group]
    style = f'fill="{"#ffffff" if hollow else colour}" stroke="{colour}" stroke-width="1.8"'
    kind = SHAPES[group]
    if kind == "circle":
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r}" {style}/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
        "cross": ((-1, -0.4), (-0.4, -0.4), (-0.4, -1), (0.4, -1), (0.4, -0.4), (1, -0.4),
                  (1, 0.4), (0.4, 0.4), (0.4, 1), (-0.4, 1), (-0.4, 0.4), (-1, 0.4)),
    }[kind]  # fmt: skip
    outline = " ".join(f"{x + r * a:.2f},{y + r * b:.2f}" for a, b in corners)
    return f'<polygon points="{outline}" {style}/>'


def _label(
    figures: Figures,
    point: Point,
    x: float,
    y: float,
    taken: list[tuple[float, float, float, float]],
) -> str:
    """ "0.25 int4" beside the mark, where it covers no mark or other label; else no label."""
    budget, precision = (
        figures.plain(style, "contenders", point.place, key)
        for style, key in (("budget", "budget"), ("budget", "precision"))
    )
    group = figures.value("contenders", point.place, "group")
    named = group in ("budgeted", "svd")
    words = f"{budget} {precision}" if named else f"{group} {precision}"
    width = LABEL_WIDTH * len(words)
    for dx, dy in OFFSETS:
        left = x + dx if dx > 0 else x + dx - width
        box = (left, y + dy - LABEL_HEIGHT + 2, left + width, y + dy + 2)
        inside = LEFT < box[0] and box[2] < WIDTH - 2 and TOP - 8 < box[1] and box[3] < HEIGHT - 46
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            head = (
                figures.html("budget", "contenders", point.place, "budget", element="tspan")
                if named
                else f'<tspan class="fixed">{group}</tspan>'
            )
            tail = figures.html("budget", "contenders", point.place, "precision", element="tspan")
            return f'<text x="{left:.1f}" y="{y + dy:.1f}" class="label">{head} {tail}</text>'
    return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _front(
    xs: Sequence[float], ys: Sequence[float], right_is_better: bool, high_is_better: bool
) -> list[int]:
    """Points that no other beats in both, from the best x on."""
    order = sorted(range(len(xs)), key=lambda i: -xs[i] if right_is_better else xs[i])
    front: list[int] = []
    for i in order:
        better = not front or (ys[i] > ys[front[-1]] if high_is_better else ys[i] < ys[front[-1]])
        if better:
            front.append(i)
    return front


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade; every tenth of a decade where the range is short."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    if sum(low <= t <= high for t in ticks) >= 3:
        return ticks
    step = _round_step((high - low) / 4)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return size * next(m for m in (1, 2, 5, 10) if m * size >= step * 0.999)


def _short(value: float) -> str:
    """ "0.2", "500", "20k", "300M", "1.5G"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"
