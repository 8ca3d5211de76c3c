"""Command-line flags as fields of a frozen dataclass: help, range and default in one place.

A command declares ``name: type = flag(default, "help", check, "what is allowed")`` and parses with
``parse_flags``, which reports every wrong flag at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

from distill.commit import UserError


def flag(
    default: Any,
    text: str,
    check: Callable[[Any], bool],
    allowed: str,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A flag of the default's type; ``convert`` where a default of None does not tell it."""
    metadata = {"help": text, "check": check, "allowed": allowed, "convert": convert}
    return field(default=default, metadata=metadata)


def choice(default: str, text: str, choices: Sequence[str]) -> Any:
    return flag(default, text, lambda v: v in choices, " | ".join(choices))


def fraction(default: float, text: str) -> Any:
    return flag(default, text, lambda v: 0 <= v < 1, "0 ≤ value < 1")


def positive(default: float, text: str) -> Any:
    kind = "a whole number" if isinstance(default, int) else "a number"
    return flag(default, text, lambda v: v > 0, f"{kind} above 0")


def switch(text: str) -> Any:
    return flag(False, text, lambda v: isinstance(v, bool), "given or not")


def text(default: str | None, text: str, allowed: str) -> Any:
    return flag(default, text, lambda v: v is None or bool(v), allowed)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_flags(
    flags: type[Any], argv: Sequence[str], *, prog: str, description: str
) -> dict[str, Any]:
    """The values that ``argv`` gives, by field name; a flag that is not given is not there.

    Raises UserError that reports every wrong flag at once.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for known in fields(flags):
        _add(parser, known)
    parsed, unknown = parser.parse_known_args(list(argv))
    given = vars(parsed)
    problems = [f"{' '.join(unknown)}: no such flag"] if unknown else []
    values = {}
    for known in fields(flags):
        if known.name not in given:
            continue
        try:
            values[known.name] = _converted(known, given[known.name])
        except ValueError:
            problems.append(_problem(known, given[known.name]))
            continue
        if not known.metadata["check"](values[known.name]):
            problems.append(_problem(known, given[known.name]))
    if problems:
        raise UserError("; ".join(problems) + f"; see {prog} --help")
    return values


def _add(parser: argparse.ArgumentParser, known: Field[Any]) -> None:
    name = "--" + known.name.replace("_", "-")
    if known.default is MISSING:
        raise TypeError(known.name)
    if known.default is False:
        parser.add_argument(
            name, action="store_true", default=argparse.SUPPRESS, help=known.metadata["help"]
        )
        return
    shown = " ".join(known.default) if isinstance(known.default, tuple) else known.default
    default = "" if shown in (None, "") else f"; default {shown}"
    text = f"{known.metadata['help']} ({known.metadata['allowed']}{default})".replace("%", "%%")
    many: dict[str, Any] = {"nargs": "+"} if isinstance(known.default, tuple) else {}
    metavar = known.name.rpartition("_")[2].upper()
    parser.add_argument(name, default=argparse.SUPPRESS, help=text, metavar=metavar, **many)


def _converted(known: Field[Any], value: Any) -> Any:
    if known.metadata["convert"] is not None:
        return known.metadata["convert"](value)
    if isinstance(known.default, bool):
        return value
    if isinstance(known.default, tuple):
        return tuple(value)
    if isinstance(known.default, int):
        return int(value)
    if isinstance(known.default, float):
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    return value


def _problem(known: Field[Any], value: Any) -> str:
    received = " ".join(value) if isinstance(value, list) else value
    return f"--{known.name.replace('_', '-')} {received}: allowed is {known.metadata['allowed']}"
