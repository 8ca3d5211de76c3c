"""The layer × module map of a plan as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from evaluate.module_stack import layer_of
from evaluate.report.figures import Figures

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 52, 15, 34, 20
KEEP, REMOVE = "#0072B2", "#ffffff"
SHADES = {
    "narrow": ((224, 240, 250), (86, 180, 233)),
    "approximate": ((255, 242, 209), (230, 158, 0)),
}


def module_map(figures: Figures, run: str) -> str:
    """Kept modules blue, narrowed ones pale blue with their neurons, approximated ones orange with
    their rank, removed ones hollow."""
    decisions = figures.value("plans", run, "decisions")
    places = [layer_of(d["module"]) for d in decisions]
    layers = sorted({layer for layer, _ in places})
    names = list(dict.fromkeys(name for _, name in places))
    parts = [
        f'<text x="{LEFT + CELL_WIDTH * (i + 0.5)}" y="13" class="tick fixed" '
        f'text-anchor="middle">{escape(name.removesuffix("_proj"))}</text>'
        for i, name in enumerate(names)
    ]
    for row, layer in enumerate(layers):
        parts.append(
            f'<text x="{LEFT - 6}" y="{TOP + CELL_HEIGHT * row + 11}" class="tick fixed" '
            f'text-anchor="end">{layer}</text>'
        )
    for number, (decision, (layer, name)) in enumerate(zip(decisions, places, strict=True)):
        x = LEFT + CELL_WIDTH * names.index(name)
        y = TOP + CELL_HEIGHT * layers.index(layer)
        parts.append(_cell(figures, run, number, decision, x, y))
    width, height = LEFT + CELL_WIDTH * len(names) + 4, TOP + CELL_HEIGHT * len(layers) + 4
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="module map of {escape(run)}">{"".join(parts)}</svg>'
    )


def _cell(
    figures: Figures, run: str, number: int, decision: Mapping[str, Any], x: float, y: float
) -> str:
    action = decision["action"]
    fill = KEEP if action == "keep" else REMOVE if action == "remove" else _shade(decision)
    stroke = "#999999" if action == "remove" else "none"
    box = (
        f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )
    middle, base = x + CELL_WIDTH / 2, y + 11
    ink = "#ffffff" if action == "keep" else "#222222"
    text = f'<text x="{middle}" y="{base}" class="cell" fill="{ink}" text-anchor="middle">'
    if action in SHADES:
        rank = figures.html("count", "plans", run, "decisions", number, "rank", element="tspan")
        return f"{box}{text}{rank}</text>"
    return f"{box}{text}{'keep' if action == 'keep' else '·'}</text>"


def _shade(decision: Mapping[str, Any]) -> str:
    """The deeper the more of the dense work is done."""
    share = decision["macs"] / (decision["out_features"] * decision["in_features"])
    weight = min(max(share, 0.0), 1.0) ** 0.5
    red, green, blue = (
        round(p + weight * (d - p)) for p, d in zip(*SHADES[decision["action"]], strict=True)
    )
    return f"rgb({red},{green},{blue})"
