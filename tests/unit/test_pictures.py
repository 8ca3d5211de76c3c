"""The two pictures: damaged and resumed logs, any number of layers, true counts and colours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from distill import pictures
from distill.artifact import UserError
from distill.module_map import BLUE, macs_share, module_map_figure
from distill.pictures import plot_module_map, plot_training, training_figure
from distill.training_log import read_training_log

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def plan_of(layers: int) -> dict[str, Any]:
    """v_proj kept, layer 0's k_proj removed, the last MLP of several narrowed to 512 neurons, the
    rest at rank 96."""
    decisions = []
    for layer in range(layers):
        for name, (out, into) in SHAPES.items():
            action, rank, macs = "approximate", 96, 96 * (out + into)
            if name.endswith("v_proj"):
                action, rank, macs = "keep", min(out, into), out * into
            elif layer == 0 and name.endswith("k_proj"):
                action, rank, macs = "remove", 0, 0
            elif 0 < layer == layers - 1 and name.startswith("mlp"):
                action, rank, macs = "narrow", 512, 512 * 576
            decisions.append(
                {
                    "module": f"model.layers.{layer}.{name}", "action": action, "rank": rank,
                    "macs": macs, "out_features": out, "in_features": into, "reason": "",
                }
            )  # fmt: skip
    dense = sum(d["out_features"] * d["in_features"] for d in decisions)
    return {
        "budget": 0.5, "method": "budgeted", "allocation": "spectral", "rank_multiple": 32,
        "dense_macs": dense, "macs": sum(d["macs"] for d in decisions), "decisions": decisions,
    }  # fmt: skip


def record(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "tokens": 2048 * step, "loss": 4.0 - step / 100, "kl": 1.0, **values}


def write_log(path: Path, records: list[dict[str, float]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail, encoding="utf-8")
    return path


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_is_picture(path: Path) -> None:
    """A complete PNG with more than one colour."""
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert float(pixels[..., :3].std()) > 0.01


@pytest.mark.parametrize(
    "tail", ["", '{"step": 41, "los', "\x00\x00", "[]\nnull\n7\n", '{"a": 1}\n']
)
def test_a_torn_or_foreign_line_is_skipped(tmp_path: Path, tail: str) -> None:
    whole = [record(step) for step in range(1, 41)]
    log = write_log(tmp_path / "log.jsonl", whole, tail)
    assert read_training_log(log) == whole
    plot_training(log, tmp_path / "training.png", budget=0.25)
    assert_is_picture(tmp_path / "training.png")


def test_a_line_torn_in_the_middle_costs_that_line_alone(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl", [record(1)], '{"step": 2, "lo{"step": 2, "tokens": 9}\n'
    )
    with log.open("a") as file:
        file.write(json.dumps(record(3)) + "\n")
    assert [r["step"] for r in read_training_log(log)] == [1, 3]


def test_a_resumed_run_replaces_what_it_does_again(tmp_path: Path) -> None:
    first = [record(step, kl=1.0) for step in range(1, 8)]
    again = [record(step, kl=2.0) for step in range(5, 7)]
    log = write_log(tmp_path / "log.jsonl", [*first, *again, {**record(6), "perplexity": 50.0}])
    records = read_training_log(log)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["kl"] for r in records] == [1.0] * 4 + [2.0, 1.0]
    assert records[-1]["perplexity"] == 50.0


def test_panels_follow_the_data(tmp_path: Path) -> None:
    few = training_figure([record(1), record(2)])
    assert [axes.get_title(loc="left") for axes in few.axes] == ["Loss"]
    full = record(3, hidden=0.2, macs_fraction=0.5, lr=1e-4, tokens_per_s=300.0)
    more = training_figure([record(1), full], budget=0.25)
    assert len(more.axes) == 5
    assert "budget F 0.25" in texts(more)
    assert all(axes.get_ylabel() and axes.get_xlabel() == "training tokens" for axes in more.axes)


def test_a_term_that_is_switched_off_gets_no_panel() -> None:
    steps = range(1, 4)
    off = training_figure([record(step, hidden=0.0) for step in steps])
    on = training_figure([record(step, hidden=0.1) for step in steps])
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in (off, on)]
    assert titles == [["Loss"], ["Loss", "Hidden states"]]


def test_values_that_are_no_numbers_leave_a_gap(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "tokens": 5, "loss": NaN}\n{"step": 2, "tokens": 9, "loss": 2}\n')
    (axes,) = training_figure(read_training_log(log)).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2.0]]  # type: ignore[union-attr]


def test_an_empty_log_says_so_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    assert "no training step was logged" in texts(training_figure([]))
    plot_training(write_log(tmp_path / "log.jsonl", []), tmp_path / "training.png")
    assert_is_picture(tmp_path / "training.png")
    with pytest.raises(UserError, match="python -m distill"):
        plot_training(tmp_path / "missing.jsonl", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_a_long_noisy_series_gets_its_running_mean(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=400)
    records = [record(step + 1, kl=2.0 + float(noise[step])) for step in range(400)]
    axes = training_figure(records).axes[0]
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    assert len(curves) == 4
    assert curves[3].std() < 0.4 * curves[2].std()
    assert curves[3].mean() == pytest.approx(curves[2].mean(), abs=0.02)


@pytest.mark.parametrize("layers", [1, 30, 80])
def test_the_map_shows_every_module_and_the_true_counts(tmp_path: Path, layers: int) -> None:
    plan, narrow = plan_of(layers), 3 * (layers > 1)
    figure = module_map_figure(plan)
    shown, pairs = texts(figure), 6 * layers - 1 - narrow
    (title,) = [text for text in shown if text.startswith("Budget F")]
    assert "Budget F = 0.5" in title
    assert f"{layers} keep · {narrow} narrow · {pairs} approximate · 1 remove" in title
    assert f"{plan['macs'] / plan['dense_macs']:.2%}" in title
    assert shown.count("keep") == layers
    assert shown.count("96") == pairs + (layers > 96)
    assert shown.count("512") == narrow
    assert len(figure.axes) == (2 if layers == 80 else 1)
    plot_module_map(plan, tmp_path / "modules.png")
    assert_is_picture(tmp_path / "modules.png")


@pytest.mark.parametrize("layers", [30, 80])
def test_no_writing_leaves_its_cell_or_the_picture(layers: int) -> None:
    plan = plan_of(layers)
    for decision in plan["decisions"]:
        if decision["action"] in ("approximate", "narrow"):
            decision["rank"] = 14336
    figure = module_map_figure(plan)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    across = legend.get_window_extent()
    assert 0 <= across.x0 < across.x1 <= figure.bbox.width
    for axes in figure.axes:
        cell = axes.transData.transform([[0, 0], [1, 1]])
        width, height = np.abs(cell[1] - cell[0])
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.height < 0.95 * height
            assert box.width < 0.95 * width


def test_a_kept_cell_is_blue_and_an_approximated_one_deepens_with_its_share() -> None:
    plan = plan_of(1)
    (axes,) = module_map_figure(plan).axes
    red, green, blue = (int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5))
    faces = [patch.get_facecolor() for patch in axes.patches]
    assert (red, green, blue, 1.0) in faces
    low, high = faces[4], faces[0]  # gate_proj spends a quarter of its MACs, q_proj a third
    assert macs_share(plan["decisions"][4:5]) < macs_share(plan["decisions"][:1])
    assert high[2] < low[2]


def test_a_narrowed_cell_is_a_pale_blue_that_deepens_with_its_share() -> None:
    plan = plan_of(2)
    pair, narrow, wider = plan["decisions"][4], *plan["decisions"][-2:]
    wider |= {"rank": 1024, "macs": 1024 * 576}
    (axes,) = module_map_figure(plan).axes
    assert [d["rank"] for d in (pair, narrow, wider)] == [96, 512, 1024]
    faces = [patch.get_facecolor() for patch in axes.patches]
    of_layer = len(faces) // 2
    orange, pale, deep = faces[4], faces[of_layer + 5], faces[of_layer + 6]
    assert orange[0] > orange[2] and pale[2] > pale[0] > deep[0] and deep[2] > deep[0]


def test_a_module_outside_the_layers_is_refused() -> None:
    plan = plan_of(1)
    plan["decisions"][0]["module"] = "lm_head"
    with pytest.raises(ValueError, match="lm_head"):
        module_map_figure(plan)


def test_a_failed_picture_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "modules.png"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        plot_module_map(plan_of(1), target)
    assert [path.name for path in tmp_path.iterdir()] == ["modules.png"]
    assert target.read_bytes() == b"old"


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_module_map(plan_of(3), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pyplot_is_never_imported() -> None:
    source = "import sys, distill.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False).returncode == 0
