"""Numbers of the report as text, each tied by a JSON pointer to the figure it shows.

The pages get every number from here, so that none can differ from report.json: in the HTML each
stands in an element with ``data-path`` (RFC 6901) and ``data-format``.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

FORMATS: Mapping[str, tuple[float, int, str]] = {
    "count": (1, 0, ""),
    "f1": (1, 1, ""),
    "f2": (1, 2, ""),
    "f3": (1, 3, ""),
    "percent": (100, 0, " %"),
    "percent1": (100, 1, " %"),
    "times": (1, 2, " ×"),
    "ms": (1, 2, " ms"),
    "seconds": (1, 1, " s"),
    "MB": (1e-6, 1, " MB"),
    "GB": (1e-9, 1, " GB"),
    "GB/s": (1e-9, 1, " GB/s"),
    "GFLOP/s": (1e-9, 0, " GFLOP/s"),
    "MMAC": (1e-6, 1, " M"),
    "tokens/s": (1, 0, " tokens/s"),
}
MISSING = "–"


def written(value: Any, style: str) -> str:
    """A value in one of FORMATS ("budget": as short as it goes); words unchanged; None a dash."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if style == "budget":
        return f"{value:g}"
    scale, places, unit = FORMATS[style]
    return f"{value * scale:,.{places}f}{unit}"


def pointer(*keys: str | int) -> str:
    """RFC 6901: ("plans", "a/b", 0) -> "/plans/a~1b/0"."""
    return "".join("/" + str(k).replace("~", "~0").replace("/", "~1") for k in keys)


def resolved(report: Any, path: str) -> Any:
    """The figure that a pointer means. Raises: KeyError or IndexError when there is none."""
    value = report
    for part in path.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


class Figures:
    """Writes figures of one report."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report

    def value(self, *keys: str | int) -> Any:
        """The figure, or None where a step on the way is missing."""
        try:
            return resolved(self.report, pointer(*keys))
        except (KeyError, IndexError, TypeError):
            return None

    def plain(self, style: str, *keys: str | int) -> str:
        """The figure as text."""
        return written(self.value(*keys), style)

    def html(self, style: str, *keys: str | int, element: str = "data") -> str:
        """The figure as an HTML or SVG element that names its pointer."""
        value = self.value(*keys)
        if value is None:
            return MISSING
        text = escape(written(value, style))
        attributes = f'data-path="{escape(pointer(*keys))}" data-format="{style}"'
        return f"<{element} {attributes}>{text}</{element}>"

    def interval(self, style: str, *keys: str | int) -> str:
        """Both ends of an interval, "low–high", as HTML; nothing where there is none."""
        if self.value(*keys) is None:
            return ""
        low, high = (self.html(style, *keys, end) for end in (0, 1))
        return f'<span class="interval">{low} to {high}</span>'

    def plain_interval(self, style: str, *keys: str | int) -> str:
        if self.value(*keys) is None:
            return ""
        return f" ({self.plain(style, *keys, 0)} to {self.plain(style, *keys, 1)})"
