"""The fields of a JSON request, taken one by one and checked strictly: types are not guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deploy.server_errors import ApiError, bad_field, shown


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises: ApiError 400 for invalid UTF-8, malformed JSON, NaN and infinities, numbers of
        thousands of digits, nesting too deep, and anything that is not an object.
    """
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _bad_body(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _bad_body("the body is nested too deeply") from None
    except ValueError as error:
        reason = str(error).splitlines()[0] if str(error) else "malformed"
        raise _bad_body(f"the body is not JSON ({reason})") from None
    if not isinstance(parsed, dict):
        raise _bad_body(f"the body is {shown(parsed)}")
    return parsed


class Fields:
    """Takes fields out of a request; `finish` refuses those that nobody took.

    A field that is absent or null has its default. Every method raises ApiError 400.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = dict(body)
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str, *, required: bool = False) -> str | None:
        value = self.take(name)
        if value is None and not required:
            return None
        return checked_text(name, value)

    def switch(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_field(name, value, "true or false")
        return value

    def whole(self, name: str, low: int, high: int, *, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_field(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        return checked_number(name, value, low, high)

    def only(self, name: str, *allowed: Any) -> None:
        """Take a field that this server knows but supports in few values only."""
        value = self.take(name)
        if value is None or any(value == a and type(value) is type(a) for a in allowed):
            return
        listed = ", ".join(json.dumps(a) for a in (*allowed, None))
        raise bad_field(name, value, f"{listed}, because this server does not support more")

    def ignore(self, *names: str) -> None:
        """Take fields that change nothing in the answer."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        if not self._left:
            return
        name = min(self._left)
        raise ApiError(
            400,
            f"{shown(name)} is no field of this request; allowed are "
            f"{', '.join(sorted(self._known))}; leave it out",
            param=name[:80].encode("ascii", "backslashreplace").decode(),
            code="unknown_field",
        )


def checked_text(name: str, value: Any) -> str:
    """`value` if it is text that UTF-8 can hold: no half of a surrogate pair."""
    if not isinstance(value, str):
        raise bad_field(name, value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_field(name, value, "text without lone surrogates") from None
    return value


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_field(name, value, f"a number from {low:g} to {high:g}")
    if isinstance(value, float) and not math.isfinite(value) or not low <= value <= high:
        raise bad_field(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _bad_body(received: str) -> ApiError:
    return ApiError(
        400,
        f"{received}; needs one JSON object in UTF-8; correct it and send the request again",
        code="invalid_json",
    )
