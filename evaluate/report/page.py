"""report.html: one file that opens without network and without scripts.

Every number comes from `Figures` and so carries the JSON pointer of the figure that it shows.
Prose that has digits of its own ("95 %") is marked `fixed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluate.report.cards import baseline_verdicts, headline_cards
from evaluate.report.charts import Point, key_mark, probe_chart, scatter
from evaluate.report.figures import Figures
from evaluate.report.module_map import module_map
from evaluate.report.speed_tables import footprint_table, latency_table, module_table
from evaluate.report.style import STYLE
from evaluate.report.tables import (
    ceiling_list,
    headline_table,
    language_table,
    probe_tables,
    seconds_list,
    settings_list,
)

CHARTED_STUDENTS = 7


def html_page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    figures = Figures(report)
    sections = [
        _head(figures),
        _section("What the budget bought and what it cost", headline_cards(figures)),
        _section("Against the baselines", baseline_verdicts(figures)),
        _section("Every contender", headline_table(figures)),
        _section("Quality against cost", _pareto(figures)),
        _section("Language modelling", language_table(figures)),
        _section("Behaviour: few-shot probes", _probes(figures)),
        _section("Compressed modules alone", module_table(figures)),
        _section("Whole-model speed", latency_table(figures)),
        _section("Load time and memory", footprint_table(figures)),
        _section("Which modules were kept", _maps(figures)),
        _section("How it was measured", settings_list(figures) + ceiling_list(figures)),
        _section("Machine", _machine(figures)),
        _section("Reproduce", _commands(figures) + seconds_list(figures)),
    ]
    title = escape(str(report["title"]))
    return (
        '<!DOCTYPE html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _head(figures: Figures) -> str:
    report = figures.report
    parts = [
        f"<h1>{figures.html('budget', 'title')}</h1>",
        f'<p class="small">Written {figures.html("budget", "created")} by '
        f"<code>{figures.html('budget', 'command')}</code></p>",
    ]
    if report["settings"]["quick"]:
        parts.append(
            '<p class="note">Quick look: few windows, queries and rounds. The intervals are wide; '
            "measure without --quick before deciding anything.</p>"
        )
    for place in range(len(report["notes"])):
        parts.append(f'<p class="note">{figures.html("budget", "notes", place)}</p>')
    for place in range(len(report["failures"])):
        name, stage, message = (
            figures.html("budget", "failures", place, key) for key in ("id", "stage", "message")
        )
        parts.append(f'<p class="note"><b>Failed: {name}</b> ({stage}): {message}</p>')
    return "\n".join(parts)


def _pareto(figures: Figures) -> str:
    """Perplexity and probe accuracy against speed, bytes and MACs."""
    contenders = figures.report["contenders"]
    shots = str(figures.report["settings"]["headline_shots"])
    quality = (
        (("perplexity", "perplexity"), "perplexity", False),
        (("probes", "by_shots", shots, "mean_hits_at_1"), f"{shots}-shot HITS@1", True),
    )
    plots = []
    for y_keys, y_label, high in quality:
        for x_label, x_of in _costs(contenders).items():
            points = [
                Point(i, ("contenders", i, *x_keys), ("contenders", i, *y_keys))
                for i, x_keys in x_of.items()
                if figures.value("contenders", i, *y_keys) is not None
            ]
            if len(points) > 1:
                plot = scatter(figures, points, x_label, y_label, high_is_better=high)
                plots.append(f"<figure>{plot}</figure>")
    if not plots:
        return ""
    legend = _legend(figures, range(len(contenders)))
    return (
        f'<div class="plots">{"".join(plots)}</div>{legend}'
        '<p class="small">Dashed: the Pareto front, which no other contender beats in both. '
        "Hollow marks: quantised weights. Speed and bytes are those of engines, MACs those of the "
        "plain models. Logarithmic axes, but for accuracy.</p>"
    )


def _costs(contenders: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, tuple[Any, ...]]]:
    """By axis label: each contender's pointer to that cost, where it was measured.

    Speed and bytes are those of engines, where there are any; MACs belong to the plain models.
    """
    plain = [i for i, c in enumerate(contenders) if c["engine"] == "pytorch"]
    engines = [i for i in range(len(contenders)) if i not in plain] or plain
    speed = {}
    for i in engines:
        rows = [
            (row["prompt_tokens"], place)
            for place, row in enumerate(contenders[i]["latency"] or [])
            if row["kind"] == "decode" and row["batch"] == 1
        ]
        if rows:
            speed[i] = ("latency", min(rows)[1], "tokens_per_s")
    return {
        "decode speed, tokens/s (batch of one)": speed,
        "graph and weights on disk, bytes": {
            i: ("model_bytes",) for i in engines if contenders[i]["model_bytes"]
        },
        "target-module MACs a token": {i: ("target_macs_per_token",) for i in plain or engines},
    }


def _legend(figures: Figures, places: Sequence[int] | range) -> str:
    items = [
        f"<li>{key_mark(figures, i)} {figures.html('budget', 'contenders', i, 'label')}</li>"
        for i in places
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _probes(figures: Figures) -> str:
    contenders = figures.report["contenders"]
    plain = [i for i, c in enumerate(contenders) if c["engine"] == "pytorch" and c["probes"]]
    plain = plain or [i for i, c in enumerate(contenders) if c["probes"]]
    if not plain:
        return ""
    dense = [i for i in plain if contenders[i]["group"] == "dense"][:1]
    charted = dense + [i for i in plain if i not in dense][:CHARTED_STUDENTS]
    shots = str(figures.report["settings"]["headline_shots"])
    tasks = list(contenders[charted[0]]["probes"]["by_shots"][shots]["tasks"])
    chart = probe_chart(figures, charted, tasks, shots)
    return f"<figure>{chart}</figure>{_legend(figures, charted)}{probe_tables(figures, plain)}"


def _maps(figures: Figures) -> str:
    runs = [run for run in figures.report["plans"] if figures.report["plans"][run]["decisions"]]
    pictures = [
        f"<figure>{module_map(figures, run)}<figcaption>"
        f"{figures.html('budget', 'plans', run, 'method')}, budget F = "
        f"{figures.html('budget', 'plans', run, 'budget')}: "
        f"{figures.html('MMAC', 'plans', run, 'macs')} of "
        f"{figures.html('MMAC', 'plans', run, 'dense_macs')} MACs a token"
        "</figcaption></figure>"
        for run in runs
    ]
    if not pictures:
        return ""
    return (
        '<p class="small">Rows: layers. Blue: kept dense. Pale blue: narrowed to the neurons '
        "shown. Orange: approximated at the rank shown. Both are deeper with more of the dense "
        "work. White: removed.</p>"
        f'<div class="maps">{"".join(pictures)}</div>'
    )


def _machine(figures: Figures) -> str:
    def item(name: str, value: str) -> str:
        return f"<dt>{escape(name)}</dt><dd>{value}</dd>"

    machine = figures.report["machine"]
    units = ", ".join(
        figures.html("budget", "machine", "vector_units", i)
        for i in range(len(machine["vector_units"]))
    )
    libraries = ", ".join(
        f'<span class="fixed">{escape(name)}</span> '
        f"{figures.html('budget', 'machine', 'libraries', name)}"
        for name in machine["libraries"]
    )
    power = "; ".join(
        f'{when}: <span class="fixed">{escape(str(state))}</span>'
        for when, state in figures.report["power"].items()
    )
    return (
        "<dl>"
        + item("processor", f"{figures.html('budget', 'machine', 'processor')} ({units})")
        + item("usable cores", figures.html("count", "machine", "logical_cores"))
        + item("memory", figures.html("GB", "machine", "memory_bytes"))
        + item("system", figures.html("budget", "machine", "system"))
        + item("Python", figures.html("budget", "machine", "python"))
        + item("libraries", libraries)
        + item("power and load", power)
        + "</dl>"
    )


def _commands(figures: Figures) -> str:
    lines = [
        figures.html("budget", "reproduce", i) for i in range(len(figures.report["reproduce"]))
    ]
    return f"<pre>{chr(10).join(lines)}</pre>"
