"""The run folder's two pictures: training curves, and which part of each module was kept.

Drawn without pyplot, so nothing global is touched. Colours are Okabe and Ito's, which readers with
any colour vision can tell apart; every cell carries its meaning in writing as well.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from distill.artifact import UserError

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY, INK = "#CC79A7", "#777777", "#222222"
PALE_ORANGE, DEEP_ORANGE = (1.00, 0.95, 0.82), (0.90, 0.62, 0.00)
ACTIONS = ("keep", "approximate", "remove")
LAYERS_PER_BLOCK = 40
SMOOTHING_FROM_STEPS = 60
DPI = 150

# title, unit of the y axis, JSONL keys with their labels and colours, logarithmic when wide
PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...], bool], ...] = (
    ("Loss", "nats per token", (("loss", "loss", INK), ("kl", "KL to teacher", BLUE)), True),
    ("Hidden-state error", "share of teacher's norm²", (("hidden", "hidden", VERMILLION),), True),
    ("Held-out perplexity", "perplexity", (("perplexity", "student", PURPLE),), True),
    ("Compute", "MACs ÷ dense MACs", (("macs_fraction", "target modules", GREEN),), False),
    ("Learning rate", "learning rate", (("lr", "lr", GREY),), False),
    ("Speed", "tokens per second", (("tokens_per_s", "tokens/s", ORANGE),), False),
)


def plot_training(
    jsonl_path: Path,
    png_path: Path,
    *,
    budget: float | None = None,
    teacher_perplexity: float | None = None,
    title: str = "Training",
) -> None:
    """Draw the training log's figures against the tokens seen; panels without data are left out.

    Args:
        jsonl_path: one JSON object a line with `step` and `tokens` and any of the keys of PANELS.
            Lines cut short by a kill are skipped; a step logged again after resuming replaces the
            earlier one and all after it.
        budget: drawn as a line into the compute panel.
        teacher_perplexity: drawn as a line into the perplexity panel.

    Raises: UserError when the log is missing.
    """
    records = read_training_log(jsonl_path)
    levels = {"macs_fraction": (budget, "budget F"), "perplexity": (teacher_perplexity, "teacher")}
    panels = [panel for panel in PANELS if any(_has_data(records, key) for key, _, _ in panel[2])]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 0.7 + 2.7 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(_training_title(title, budget, records), fontsize=12, color=INK)
    for place, (name, unit, series, log_when_wide) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, place + 1)
        drawn = [_draw_series(axes, records, *one) for one in series]
        level, label = levels.get(series[0][0], (None, ""))
        if level is not None and math.isfinite(level):
            axes.axhline(level, color=INK, linestyle="--", linewidth=1, label=f"{label} {level:.4g}")
        _finish_axes(axes, name, unit, records, log_when_wide and _is_wide(drawn))
    if not panels:
        figure.text(0.5, 0.4, "no training step was logged", ha="center", color=GREY)
    _save(figure, png_path)


def read_training_log(jsonl_path: Path) -> list[dict[str, Any]]:
    """Records of a training log by rising step; see `plot_training` for what is skipped."""
    try:
        lines = Path(jsonl_path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{jsonl_path} cannot be read: {error.strerror}; needs the JSONL log of a training "
            "run; train first with: python -m distill --budget F"
        ) from error
    records: list[dict[str, Any]] = []
    for line in lines:
        record = _record(line)
        if record is None:
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        if records and records[-1]["step"] == record["step"]:
            records[-1].update(record)
        else:
            records.append(record)
    return records


def plot_module_map(plan: Mapping[str, Any], png_path: Path) -> None:
    """Draw a plan.json as a layer × module grid: kept, approximated with its rank, or removed.

    An approximated cell is the deeper the larger its share of the dense work. Bars give every
    layer's share, column heads every module's.

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
    figure.legend(handles=_map_legend(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, png_path)


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
        _draw_share(axes, len(modules) + 0.12, y, _share(row))
    heads = [
        f"{module}\n{_share([d for (_, m), d in cells.items() if m == module]):.0%}"
        for module in modules
    ]
    axes.set_xticks(
        [*(x + 0.5 for x in range(len(modules))), len(modules) + 0.6],
        [*heads, "layer's\nMACs"],
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
    elif action == "approximate":
        style = {"facecolor": _orange(_share([decision]))}
    else:
        text = ""
    axes.add_patch(Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, linewidth=0, **style))
    axes.text(x + 0.5, y + 0.53, text, ha="center", va="center", fontsize=7, color=ink)


def _draw_share(axes: Axes, x: float, y: float, share: float) -> None:
    axes.add_patch(Rectangle((x, y + 0.2), 0.8, 0.6, facecolor="#EEEEEE"))
    axes.add_patch(Rectangle((x, y + 0.2), 0.8 * share, 0.6, facecolor=GREEN))
    axes.text(x + 0.85, y + 0.53, f"{share:.0%}", va="center", fontsize=7, color=INK)


def _draw_series(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str, colour: str
) -> np.ndarray:
    """Draw one key; a long noisy series pale with its running mean on top. Returns its values."""
    points = [(r["tokens"], r[key]) for r in records if _is_number(r.get(key))]
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    if not len(values):
        return values
    smooth = key in ("loss", "kl", "hidden", "tokens_per_s") and len(values) >= SMOOTHING_FROM_STEPS
    marker = "o" if len(values) <= 12 else None
    axes.plot(
        tokens, values, color=colour, linewidth=0.8 if smooth else 1.5, marker=marker,
        markersize=3, alpha=0.3 if smooth else 1.0, label=None if smooth else label,
    )  # fmt: skip
    if smooth:
        axes.plot(tokens, _running_mean(values), color=colour, linewidth=1.8, label=label)
    return values


def _running_mean(values_N: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twentieth of the series, shorter at its ends."""
    half = max(1, len(values_N) // 40)
    total = np.concatenate([[0.0], np.cumsum(values_N)])
    at = np.arange(len(values_N))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values_N))
    return (total[high] - total[low]) / (high - low)


def _finish_axes(
    axes: Axes, name: str, unit: str, records: Sequence[Mapping[str, Any]], log: bool
) -> None:
    axes.set_title(name, fontsize=10, loc="left", color=INK)
    axes.set_ylabel(unit, fontsize=9)
    axes.set_xlabel("training tokens", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(0, max((r["tokens"] for r in records), default=1) * 1.02 or 1)
    if log:
        axes.set_yscale("log")
    elif name == "Compute":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(0, None)
    axes.grid(True, which="both", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, frameon=False)


def _is_wide(series: Sequence[np.ndarray]) -> bool:
    """Positive values over more than a factor of ten."""
    values = np.concatenate(series)
    return bool(len(values) and values.min() > 0 and values.max() > 10 * values.min())


def _map_title(plan: Mapping[str, Any]) -> str:
    counts = {a: sum(d["action"] == a for d in plan["decisions"]) for a in ACTIONS}
    used = plan["macs"] / plan["dense_macs"] if plan["dense_macs"] else 0.0
    return (
        f"Budget F = {plan['budget']:g}: {used:.2%} of the dense MACs "
        f"({plan['macs'] / 1e6:,.1f} of {plan['dense_macs'] / 1e6:,.1f} million a token)\n"
        f"{counts['keep']} keep · {counts['approximate']} approximate · {counts['remove']} remove"
        f"   (method {plan['method']}, allocation {plan['allocation']})"
    )


def _training_title(
    title: str, budget: float | None, records: Sequence[Mapping[str, Any]]
) -> str:
    parts = [title, *([] if budget is None else [f"budget F = {budget:g}"])]
    if records:
        parts.append(f"{records[-1]['tokens']:,} tokens in {records[-1]['step']:,} steps")
    return " · ".join(parts)


def _map_legend() -> list[Patch]:
    return [
        Patch(facecolor=BLUE, label="keep: dense"),
        Patch(facecolor=DEEP_ORANGE, label="approximate: rank (deeper = more MACs)"),
        Patch(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0, label="remove"),
    ]


def _share(decisions: Sequence[Mapping[str, Any]]) -> float:
    """MACs of these modules ÷ their dense MACs."""
    dense = sum(d["out_features"] * d["in_features"] for d in decisions)
    return sum(d["macs"] for d in decisions) / dense if dense else 0.0


def _orange(share: float) -> tuple[float, float, float]:
    weight = min(max(share, 0.0), 1.0)
    red, green, blue = (
        p + weight * (d - p) for p, d in zip(PALE_ORANGE, DEEP_ORANGE, strict=True)
    )
    return red, green, blue


def _place(module: str) -> tuple[int, str]:
    """ "model.layers.3.self_attn.q_proj" -> (3, "q_proj")."""
    match = re.search(r"\blayers\.(\d+)\.(?:.*\.)?([^.]+)$", module)
    if match is None:
        raise ValueError(f"{module} is in no layer; needs a name such as model.layers.0.mlp.up_proj")
    return int(match[1]), match[2]


def _record(line: bytes) -> dict[str, Any] | None:
    """The line's record, or None when it is torn, no object, or lacks step and tokens."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return record if all(_is_number(record.get(k)) for k in ("step", "tokens")) else None


def _has_data(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(_is_number(record.get(key)) for record in records)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


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
