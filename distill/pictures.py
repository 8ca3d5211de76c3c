"""The run folder's two pictures: training curves, and which part of each module was kept.

Drawn without pyplot, so nothing global is touched. Colours are Okabe and Ito's, which readers with
any colour vision can tell apart.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from distill.module_map import BLUE, DPI, GREEN, GREY, INK, module_map_figure
from distill.training_log import is_number, read_training_log

__all__ = ["plot_module_map", "plot_training", "training_figure"]

ORANGE, VERMILLION = "#E69F00", "#D55E00"
SMOOTHED_FROM_STEPS = 60
MARKED_UP_TO_STEPS = 12


@dataclass(frozen=True)
class Panel:
    """One chart: `series` are (JSONL key, label, colour); `noisy` ones get a running mean.

    `log_when_wide` makes the axis logarithmic when values span more than a factor of ten.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str, str], ...]
    noisy: bool = False
    log_when_wide: bool = False

    def has_data(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Zeros alone are none: a term of the loss that is switched off."""
        return any(is_number(r.get(key)) and r[key] for key, _, _ in self.series for r in records)


PANELS = (
    Panel(
        "Loss",
        "loss; KL in nats per token",
        (("loss", "loss", INK), ("kl", "KL to teacher", BLUE)),
        True,
    ),
    Panel("Hidden states", "squared error ÷ teacher's", (("hidden", "", VERMILLION),), True, True),
    Panel("Compute", "MACs ÷ dense MACs", (("macs_fraction", "target modules", GREEN),)),
    Panel("Learning rate", "learning rate", (("lr", "", GREY),)),
    Panel("Speed", "tokens per second", (("tokens_per_s", "", ORANGE),), True),
)


def plot_training(
    jsonl_path: Path,
    png_path: Path,
    *,
    budget: float | None = None,
    title: str = "Training",
) -> None:
    """Draw a training log; see `read_training_log` for what it may hold, `training_figure` for how.

    Raises: UserError when the log cannot be read.
    """
    records = read_training_log(jsonl_path)
    _save(training_figure(records, budget=budget, title=title), png_path)


def plot_module_map(plan: Mapping[str, Any], png_path: Path) -> None:
    """Draw a plan.json as a layer × module grid; see `module_map_figure`.

    Raises: ValueError when a decision's module is in no layer.
    """
    _save(module_map_figure(plan), png_path)


def training_figure(
    records: Sequence[Mapping[str, Any]],
    *,
    budget: float | None = None,
    title: str = "Training",
) -> Figure:
    """One panel for each of PANELS that the records have values for, against training tokens.

    `budget` is drawn as a level into the compute panel.
    """
    panels = [panel for panel in PANELS if panel.has_data(records)]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 0.7 + 2.7 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(_title(title, budget, records), fontsize=12, color=INK)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2 if len(panels) > 1 else 1, place + 1)
        _draw_panel(axes, panel, records)
        if panel.title == "Compute" and budget is not None:
            label = f"budget F {budget:.4g}"
            axes.axhline(budget, color=INK, linestyle="--", linewidth=1, label=label)
        _finish(axes, panel, records)
    if not panels:
        figure.text(0.5, 0.4, "no training step was logged", ha="center", color=GREY)
    return figure


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw every series; a long noisy one pale, with its running mean on top."""
    for key, label, colour in panel.series:
        points = [(r["tokens"], r[key]) for r in records if is_number(r.get(key))]
        tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
        if panel.noisy and len(values) >= SMOOTHED_FROM_STEPS:
            axes.plot(tokens, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(tokens, _running_mean(values), color=colour, linewidth=1.8, label=label)
        elif len(values):
            marker = "o" if len(values) <= MARKED_UP_TO_STEPS else ""
            axes.plot(tokens, values, marker=marker, ms=3, lw=1.5, color=colour, label=label)


def _running_mean(values_N: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the series, shorter at its ends."""
    half = max(1, len(values_N) // 40)
    total = np.concatenate([[0.0], np.cumsum(values_N)])
    at = np.arange(len(values_N))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values_N))
    return (total[high] - total[low]) / (high - low)


def _finish(axes: Axes, panel: Panel, records: Sequence[Mapping[str, Any]]) -> None:
    """Axes, units, grid and legend."""
    axes.set_title(panel.title, fontsize=10, loc="left", color=INK)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("training tokens", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0, 1.02 * max((r["tokens"] for r in records), default=1) or 1)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    if panel.log_when_wide and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
    elif panel.title == "Compute":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, 1.05 * max(1.0, values.max()))
    elif panel.title != "Learning rate":
        axes.set_ylim(min(0.0, values.min()), None)
    axes.grid(True, which="both", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)


def _title(title: str, budget: float | None, records: Sequence[Mapping[str, Any]]) -> str:
    parts = [title, *([] if budget is None else [f"budget F = {budget:g}"])]
    if records:
        parts.append(f"{records[-1]['tokens']:,.0f} tokens in {records[-1]['step']:,.0f} steps")
    return " · ".join(parts)


def _save(figure: Figure, png_path: Path) -> None:
    """Write the PNG so that a reader finds the old picture or the new one, never a part."""
    png_path = Path(png_path)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    partial = png_path.with_name(f".{png_path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(picture.getvalue())
        os.replace(partial, png_path)
    finally:
        partial.unlink(missing_ok=True)
