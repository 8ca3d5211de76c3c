"""Rows and cells that the tables of report.html share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluate.report.charts import key_mark
from evaluate.report.figures import Figures


def contender_name(figures: Figures, i: int, key: str = "label") -> str:
    """Mark and label of a contender; "group_label" leaves the engine out."""
    return f"{key_mark(figures, i)}&nbsp;{figures.html('budget', 'contenders', i, key)}"


def with_interval(figures: Figures, style: str, *keys: str | int) -> str:
    """A figure and, below it, its 95 % interval where there is one."""
    *head, last = keys
    return figures.html(style, *keys) + figures.interval(style, *head, f"{last}_interval95")


def row_of(contender: Mapping[str, Any], *cells: str) -> str:
    """One table row, shaded for the dense original."""
    kind = ' class="dense"' if contender["group"] == "dense" else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def table_of(heads: Sequence[str], rows: Sequence[str], note: str) -> str:
    """A table that scrolls on its own where it is too wide, with a note below."""
    head = "".join(f'<th class="fixed">{escape(h)}</th>' for h in heads)
    return (
        f'<div class="scroll"><table><caption class="fixed">{note}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
