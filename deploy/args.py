"""Command-line arguments whose errors are one line each, all of them reported together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill.commit import UserError


@dataclass(frozen=True)
class Wrong:
    """A value that was refused; `parse` reports it."""

    received: str
    allowed: str


class Parser(argparse.ArgumentParser):
    """argparse whose own complaints are UserErrors."""

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


def whole(least: int, most: int | None = None) -> Callable[[str], Any]:
    """An argparse type: a whole number in a range."""
    limit = "" if most is None else f" to {most}"
    return _ranged(int, least, most, f"a whole number from {least}{limit}")


def number(least: float, most: float | None = None, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number in a range; `above` leaves out the lower end."""
    start = f"above {least:g}" if above else f"from {least:g}"
    limit = "" if most is None else f" to {most:g}"

    def convert(text: str) -> float:
        value = float(text)
        if above and value == least:
            raise ValueError(text)
        return value

    return _ranged(convert, least, most, f"a number {start}{limit}")


def whole_numbers(least: int) -> Callable[[str], Any]:
    """An argparse type: whole numbers separated by commas, as a tuple."""

    def convert(text: str) -> Any:
        allowed = f"whole numbers from {least}, separated by commas"
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            return Wrong(text, allowed)
        return values if min(values) >= least else Wrong(text, allowed)

    return convert


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


def _ranged(
    convert: Callable[[str], Any], least: float, most: float | None, allowed: str
) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            return Wrong(text, allowed)
        fits = value >= least and (most is None or value <= most) and value != float("inf")
        return value if fits else Wrong(text, allowed)

    return checked
