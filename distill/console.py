"""What a person sees while a command runs: progress on stderr, tables of results on stdout.

On a terminal a stage shows a live bar. Elsewhere it writes a plain line when it starts, one at
most every ten seconds while it advances, and one when it ends. No escape sequence ever reaches a
stream that is not a terminal.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill.progress import Clock, Progress, joined
from distill.units import number

__all__ = ["PLAIN_INTERVAL_S", "Progress", "progress", "table"]

PLAIN_INTERVAL_S = 10.0
BAR_WIDTH = 32
FIGURE = re.compile(r"-|[-+]?\d[\d,.]*(e[-+]?\d+)?( ?[%×x]| [A-Za-z/]{1,8})?|nan|-?inf")


@contextmanager
def progress(
    total: int | None,
    title: str,
    *,
    unit: str = "tokens",
    enabled: bool = True,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Progress]:
    """Show a stage of `total` units (None: unknown) on stderr until the block ends.

    Call `.update(advance, **fields)` on what it yields. Whatever ends the block, the terminal is
    restored and a last line with the amount done stays; an interrupt or error goes on to the
    caller. `enabled=False` (processes other than the main one) counts and shows nothing.
    `clock` gives seconds.
    """
    state = Progress(total, title, unit, clock)
    if not enabled:
        yield state
        return
    stream = sys.stderr if stream is None else stream
    display: _Display = _Bar(state, stream) if _draws(stream) else _Lines(state, stream, clock)
    finished = False
    try:
        display.open()
        state.on_change = display.changed
        yield state
        finished = True
    finally:
        display.close()
        _say(stream, state.last_line(finished))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned plain-text table on stdout: columns of figures to the right.

    Numbers are written by `distill.units.number`; words stay as they are.
    Raises: ValueError when a row has more or fewer cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {list(row)} has {len(row)} cells for {len(columns)} columns")
    body = [[number(value) for value in row] for row in rows]
    places = range(len(columns))
    to_right = [bool(body) and all(FIGURE.fullmatch(row[i]) for row in body) for i in places]
    widths = [max(cell_len(row[i]) for row in [columns, *body]) for i in places]
    lines = [
        "  ".join(_padded(*cell) for cell in zip(row, widths, to_right, strict=True)).rstrip()
        for row in [columns, ["-" * width for width in widths], *body]
    ]
    print("\n".join([*([title] if title else []), *lines]), flush=True)


class _Display(Protocol):
    def open(self) -> None: ...

    def changed(self) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """A plain line at the start and then one at most every PLAIN_INTERVAL_S."""

    def __init__(self, state: Progress, stream: TextIO, clock: Clock) -> None:
        self._state, self._stream, self._clock = state, stream, clock
        self._shown_s = clock()

    def open(self) -> None:
        total = self._state.total
        start = "started" if not total else f"{number(total)} {self._state.unit} to do"
        _say(self._stream, f"{self._state.title}:  {start}")

    def changed(self) -> None:
        now_s = self._clock()
        if now_s - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = now_s
            _say(self._stream, self._state.line())

    def close(self) -> None:
        """Nothing to restore."""


class _Bar:
    """A bar with the figures below it, redrawn in place by a thread and erased at the end."""

    def __init__(self, state: Progress, stream: TextIO) -> None:
        self._state = state
        self._live = Live(
            console=Console(file=stream),
            get_renderable=self._drawn,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )

    def open(self) -> None:
        self._live.start()

    def changed(self) -> None:
        """The thread redraws."""

    def close(self) -> None:
        self._live.stop()

    def _drawn(self) -> Group:
        state, share = self._state, self._state.fraction
        bar = ProgressBar(total=1.0, completed=share or 0.0, width=BAR_WIDTH, pulse=share is None)
        percent = "" if share is None else f"{share:.0%}"
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(state.title, style="bold"), bar, Text(percent))
        figures = joined(state.amount(), state.pace(), state.fields())
        return Group(head, Text(figures, overflow="fold"))


def _draws(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _padded(text: str, width: int, to_right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if to_right else text + space


def _say(stream: TextIO, line: str) -> None:
    """Write one line; a stream that is gone must not end hours of work."""
    with suppress(OSError):
        print(line, file=stream, flush=True)
