"""Command-line arguments whose errors are one line each, all of them reported together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill.commit import UserError


@dataclass(frozen=True)
class Wrong:
    """A value that was refused; `parse` reports it."""

    received: str
    allowed: str


class _Help(argparse.HelpFormatter):
    """Help that ends with what an argument's type allows."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        allowed = getattr(action.type, "allowed", None)
        return f"{action.help} [{allowed}]" if allowed else action.help


class Parser(argparse.ArgumentParser):
    """argparse whose own complaints are UserErrors, and whose help states every range."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, **settings)

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`. Raises: UserError that names every value refused, and what is allowed."""
    args, unknown = parser.parse_known_intermixed_args(list(argv))
    problems = [f"{' '.join(unknown)}: no such flag"] if unknown else []
    for name, value in vars(args).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Wrong):
                flag = f"--{name.replace('_', '-')}"
                problems.append(f"{flag} {item.received}: allowed is {item.allowed}")
    if problems:
        raise UserError("; ".join(problems) + f"; see {parser.prog} --help")
    return args


@dataclass(frozen=True)
class Allowed:
    """An argparse type: what ``convert`` makes of the text, if it is within the limits."""

    convert: Callable[[str], Any]
    least: float
    most: float | None
    allowed: str

    def __call__(self, text: str) -> Any:
        try:
            value = self.convert(text)
        except (ValueError, OverflowError):
            return Wrong(text, self.allowed)
        low, high = (min(value), max(value)) if isinstance(value, tuple) else (value, value)
        fits = self.least <= low and (self.most is None or high <= self.most)
        return value if fits else Wrong(text, self.allowed)


def whole(least: int, most: int | None = None) -> Allowed:
    """A whole number in a range."""
    limit = "" if most is None else f" to {most}"
    return Allowed(int, least, most, f"a whole number from {least}{limit}")


def number(least: float, most: float | None = None, *, above: bool = False) -> Allowed:
    """A finite number in a range; `above` leaves out the lower end."""
    start = f"above {least:g}" if above else f"from {least:g}"
    limit = "" if most is None else f" to {most:g}"

    def convert(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or (above and value == least):
            raise ValueError(text)
        return value

    return Allowed(convert, least, most, f"a number {start}{limit}")


def whole_numbers(least: int) -> Allowed:
    """Whole numbers separated by commas, as a tuple."""

    def convert(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    return Allowed(convert, least, None, f"whole numbers from {least}, separated by commas")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What chooses and opens an engine: --run, --engine, --provider, --threads."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--run",
        metavar="RUN",
        help="run folder, its name, or an engine directory (default: the newest run with one)",
    )
    group.add_argument(
        "--engine",
        metavar="NAME",
        help="engine of that run, e.g. engine-ort/int8-cpu or int8 (default: the fastest kind)",
    )
    group.add_argument(
        "--provider",
        choices=("cpu", "cuda", "tensorrt"),
        help="ONNX Runtime's execution provider (default: the one the engine was built for)",
    )
    group.add_argument(
        "--threads", type=whole(1, 1024), help="CPU threads (default: one a physical core)"
    )
