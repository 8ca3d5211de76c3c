"""Numbers and times in the words that people read, in progress lines, tables and model cards."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def number(value: Any) -> str:
    """A value in about four digits: 102,400; 2.315; 5e-04; words as they are; None as "-"."""
    if value is None:
        return "-"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    size = abs(float(value))
    if size == 0 or 1e-3 <= size < 1000:
        return f"{float(value):.4g}"
    return f"{float(value):,.0f}" if 1000 <= size < 1e9 else f"{float(value):.3g}"


def rate(per_second: float, unit: str) -> str:
    """For example "154 tokens/s", "0.31 modules/s"."""
    shown = f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"
    return f"{shown} {unit}/s"


def duration(seconds: float) -> str:
    """For example "42s", "5m 32s", "2h 05m", "1d 03h"."""
    whole = round(max(seconds, 0.0))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if not minutes:
        return f"{whole}s"
    if not hours:
        return f"{minutes}m {whole % 60:02d}s"
    return f"{hours}h {minutes % 60:02d}m" if not days else f"{days}d {hours % 24:02d}h"
