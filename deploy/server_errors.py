"""Errors of the server as OpenAI's clients read them: one JSON object, one status each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_SHOWN = 80


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: what was received; what is allowed; what to do next.
        param: the request's field at fault, if it is one.
        code: a word for programs, e.g. "model_not_found".
        retry_after_s: seconds after which it may be tried again, sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        known = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        if self.status in known:
            return known[self.status]
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> Mapping[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(self.retry_after_s)}


def bad_field(name: str, received: object, allowed: str) -> ApiError:
    """400: the field `name` of a request holds something that is not allowed."""
    return ApiError(
        400,
        f"{name} is {shown(received)}; allowed is {allowed}; correct it and send the request again",
        param=name,
        code="invalid_value",
    )


def shown(value: object) -> str:
    """A value as an error message shows it: short, printable, one line."""
    if isinstance(value, dict):
        return f"an object of {len(value)} entries"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**MAX_SHOWN:
        return "a number of more than 80 digits"
    written = ascii(value)
    return written if len(written) <= MAX_SHOWN else f"{written[:MAX_SHOWN]}…"
