"""The headline of report.html: for each budgeted run what the budget bought and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.report.cells import contender_name
from evaluate.report.figures import MISSING, Figures
from evaluate.report.verdict import fastest, speed_of

Pointer = tuple[str | int, ...]


def headline_cards(figures: Figures) -> str:
    """One card a verdict on a run; nothing where no budgeted run was measured."""
    cards = [
        _card(figures, place, entry)
        for place, entry in enumerate(figures.report["verdict"])
        if _of_run(figures, entry["about"])
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def baseline_verdicts(figures: Figures) -> str:
    """The paired comparisons with SVD and standard LoRA as a list."""
    items = [
        f"<li><b>{figures.html('budget', 'verdict', place, 'kind')}</b>: "
        f"{figures.html('budget', 'verdict', place, 'text')}</li>"
        for place, entry in enumerate(figures.report["verdict"])
        if not _of_run(figures, entry["about"])
    ]
    return f'<ul class="pairs">{"".join(items)}</ul>' if items else ""


def _of_run(figures: Figures, run: str) -> list[int]:
    """Places of the run's contenders that have scores; the plain model first."""
    return [
        i
        for i, c in enumerate(figures.report["contenders"])
        if c["run"] == run and c["perplexity"] is not None
    ]


def _card(figures: Figures, place: int, entry: Mapping[str, Any]) -> str:
    contenders = figures.report["contenders"]
    mine = _of_run(figures, entry["about"])
    timed = [contenders[i] for i in mine if speed_of(contenders[i]) is not None]
    quick = contenders.index(fastest(timed)) if timed else mine[0]
    kind = entry["kind"]
    return (
        f'<article class="card {kind.replace(" ", "-")}">'
        f"<h3><span>{contender_name(figures, mine[0], 'group_label')}</span> "
        f"<b>{figures.html('budget', 'verdict', place, 'kind')}</b></h3>"
        f'<div class="sides"><div><h4>bought</h4><ul>{_bought(figures, quick)}</ul></div>'
        f"<div><h4>cost</h4><ul>{_cost(figures, mine[0])}</ul></div></div>"
        f"<p>{figures.html('budget', 'verdict', place, 'conclusion')}</p></article>"
    )


def _bought(figures: Figures, quick: int) -> str:
    """Speed and size of the run's fastest engine against the dense original in the same one."""
    contender = figures.report["contenders"][quick]
    modules = [
        (row["speedup"], place)
        for place, row in enumerate(figures.value("modules", "rows") or [])
        if row["stack"] == contender["run"]
    ]
    ends = [min(modules)[1], max(modules)[1]] if modules else []
    alone = " to ".join(figures.html("times", "modules", "rows", i, "speedup") for i in ends)
    rows = contender["latency"] or []
    decode, prefill = _place_of(rows, "decode", min), _place_of(rows, "prefill", max)
    at: Pointer = ("contenders", quick)
    items = [
        _item(alone or MISSING, "the dense speed in the compressed modules alone"),
        _item(_speedup(figures, at, decode), f"the dense speed in decoding ({_engine(contender)})"),
        _item(_speedup(figures, at, prefill), "the dense speed in reading prompts"),
        _item(figures.html("MB", *at, "model_bytes"), f"on disk{_dense_bytes(figures, quick)}"),
    ]
    return "".join(items)


def _cost(figures: Figures, plain: int) -> str:
    at: Pointer = ("contenders", plain)
    kept: Pointer = (*at, "probes", "retention")
    worst = figures.value(*kept, "worst_task")
    items = [
        _item(
            figures.html("times", *at, "perplexity", "ratio_to_dense"),
            f"the dense perplexity: {figures.html('f1', *at, 'perplexity', 'perplexity')}"
            f"{_dense_perplexity(figures)}",
        ),
        _item(figures.html("percent", *kept, "retention"), "of the few-shot accuracy kept"),
    ]
    if worst is not None:
        share = figures.html("percent", *kept, "tasks", worst, "retention")
        items.append(
            _item(share, f"in its worst task, {figures.html('budget', *kept, 'worst_task')}")
        )
    return "".join(items)


def _item(figure: str, words: str) -> str:
    return f"<li><strong>{figure}</strong> {words}</li>"


def _speedup(figures: Figures, at: Pointer, place: int | None) -> str:
    if place is None:
        return MISSING
    return figures.html("times", *at, "latency", place, "speedup_same_engine")


def _place_of(rows: Sequence[Mapping[str, Any]], kind: str, choose: Any) -> int | None:
    """Place of the row at batch 1 behind the shortest (min) or longest (max) prompt."""
    found = [
        (row["prompt_tokens"], place)
        for place, row in enumerate(rows)
        if row["kind"] == kind and row["batch"] == 1
    ]
    return choose(found)[1] if found else None


def _engine(contender: Mapping[str, Any]) -> str:
    """ "ONNX Runtime int8", marked as words that are no figure."""
    return f'<span class="fixed">{contender["label"].rpartition(" · ")[2]}</span>'


def _dense_bytes(figures: Figures, quick: int) -> str:
    contenders = figures.report["contenders"]
    wanted = [contenders[quick][key] for key in ("engine", "precision", "provider")]
    for i, c in enumerate(contenders):
        if c["group"] == "dense" and [c[k] for k in ("engine", "precision", "provider")] == wanted:
            return f", dense {figures.html('MB', 'contenders', i, 'model_bytes')}"
    return ""


def _dense_perplexity(figures: Figures) -> str:
    for i, c in enumerate(figures.report["contenders"]):
        if c["id"] == figures.report["reference"]:
            shown = figures.html("f1", "contenders", i, "perplexity", "perplexity")
            return f", dense {shown}"
    return ""
