"""The layer × module picture of a plan: what was kept, narrowed, approximated or removed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter

from distill.plan import ACTIONS

BLUE, GREEN, GREY, INK = "#0072B2", "#009E73", "#777777", "#222222"
PALE_ORANGE, DEEP_ORANGE = (1.00, 0.95, 0.82), (0.90, 0.62, 0.00)
PALE_BLUE, DEEP_BLUE = (0.88, 0.94, 0.98), (0.34, 0.71, 0.91)
Colour = tuple[float, float, float]
LAYERS_PER_BLOCK = 40
DPI = 150


def module_map_figure(plan: Mapping[str, Any]) -> Figure:
    """A plan.json as a layer × module grid: kept, narrowed to so many neurons, approximated with
    its rank, or removed.

    A narrowed or approximated cell is the deeper the larger its share of the dense work. Bars give
    every layer's share, column heads every module's.

    Raises: ValueError when a decision's module is in no layer.
    """
    cells = {_place(d["module"]): d for d in plan["decisions"]}
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    blocks = max(1, math.ceil(len(layers) / LAYERS_PER_BLOCK))
    rows = math.ceil(len(layers) / blocks)
    width_in = 0.6 + blocks * (0.85 * len(modules) + 1.9)
    figure = Figure(figsize=(width_in, 2.2 + 0.235 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(_map_title(plan), fontsize=12, color=INK)
    for block, axes in enumerate(np.atleast_1d(figure.subplots(1, blocks))):
        shown = layers[block * rows : (block + 1) * rows]
        _draw_block(axes, cells, shown, modules, rows)
    figure.legend(
        handles=_map_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def _draw_block(
    axes: Axes,
    cells: Mapping[tuple[int, str], Mapping[str, Any]],
    layers: Sequence[int],
    modules: Sequence[str],
    rows: int,
) -> None:
    """One column of layers, first on top, padded to `rows` so that all columns align."""
    for y, layer in enumerate(layers):
        row = [cells[layer, m] for m in modules if (layer, m) in cells]
        for x, module in enumerate(modules):
            if (layer, module) in cells:
                _draw_cell(axes, x, y, cells[layer, module])
        _draw_share(axes, len(modules) + 0.12, y, macs_share(row))
    heads = [
        f"{module}\n{macs_share([d for (_, m), d in cells.items() if m == module]):.0%}"
        for module in modules
    ]
    axes.set_xticks(
        [*(x + 0.5 for x in range(len(modules))), len(modules) + 0.6],
        [*heads, "whole\nlayer"],
        fontsize=8,
    )
    axes.set_yticks([y + 0.5 for y in range(len(layers))], [str(n) for n in layers], fontsize=8)
    axes.set_ylabel("layer")
    axes.set(xlim=(0, len(modules) + 1.45), ylim=(rows, 0))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_cell(axes: Axes, x: float, y: float, decision: Mapping[str, Any]) -> None:
    action, text, ink = decision["action"], str(decision["rank"]), INK
    style: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "hatch": "////"}
    if action == "keep":
        style, text, ink = {"facecolor": BLUE}, "keep", "white"
    elif action == "narrow":
        style = {"facecolor": _shade(PALE_BLUE, DEEP_BLUE, macs_share([decision]))}
    elif action == "approximate":
        style = {"facecolor": _shade(PALE_ORANGE, DEEP_ORANGE, macs_share([decision]))}
    else:
        text = ""
    axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, linewidth=0, **style))
    axes.text(x + 0.5, y + 0.53, text, ha="center", va="center", fontsize=7, color=ink)


def _draw_share(axes: Axes, x: float, y: float, share: float) -> None:
    axes.add_patch(Rectangle((x, y + 0.2), 0.8, 0.6, facecolor="#EEEEEE"))
    axes.add_patch(Rectangle((x, y + 0.2), 0.8 * share, 0.6, facecolor=GREEN))
    axes.text(x + 0.85, y + 0.53, f"{share:.0%}", va="center", fontsize=7, color=INK)


def _map_title(plan: Mapping[str, Any]) -> str:
    short = EngFormatter(places=1)
    counts = Counter(d["action"] for d in plan["decisions"])
    used = plan["macs"] / plan["dense_macs"] if plan["dense_macs"] else 0.0
    return (
        f"Budget F = {plan['budget']:g}: {used:.2%} of the dense MACs "
        f"({short(plan['macs'])} of {short(plan['dense_macs'])} a token)\n"
        f"{' · '.join(f'{counts[action]} {action}' for action in ACTIONS)}"
        f"   (method {plan['method']}, allocation {plan['allocation']})"
    )


def _map_legend() -> list[Patch]:
    return [
        Patch(facecolor=BLUE, label="keep: dense"),
        Patch(facecolor=DEEP_BLUE, label="narrow: neurons (deeper: more MACs)"),
        Patch(facecolor=DEEP_ORANGE, label="approximate: rank (deeper: more MACs)"),
        Patch(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0, label="remove"),
        Patch(facecolor=GREEN, label="% of dense MACs"),
    ]


def macs_share(decisions: Sequence[Mapping[str, Any]]) -> float:
    """MACs of these modules ÷ their dense MACs."""
    dense = sum(d["out_features"] * d["in_features"] for d in decisions)
    return sum(d["macs"] for d in decisions) / dense if dense else 0.0


def _shade(pale: Colour, deep: Colour, share: float) -> Colour:
    weight = min(max(share, 0.0), 1.0) ** 0.5
    red, green, blue = (p + weight * (d - p) for p, d in zip(pale, deep, strict=True))
    return red, green, blue


def _place(module: str) -> tuple[int, str]:
    """ "model.layers.3.self_attn.q_proj" -> (3, "q_proj")."""
    match = re.search(r"\blayers\.(\d+)\.(?:.*\.)?([^.]+)$", module)
    if match is None:
        raise ValueError(
            f"{module} is in no layer; needs a name such as model.layers.0.mlp.up_proj"
        )
    return int(match[1]), match[2]
