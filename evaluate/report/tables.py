"""The tables of report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluate.report.cells import contender_name, row_of, table_of, with_interval
from evaluate.report.figures import MISSING, Figures


def headline_table(figures: Figures) -> str:
    """What each contender costs and what it kept, one row each."""
    shots = str(figures.report["settings"]["headline_shots"])
    heads = (
        "contender", "target MACs ÷ dense", "perplexity", "÷ dense", f"{shots}-shot HITS@1",
        "retention", "decode, batch of 1", "÷ dense, same engine", "on disk",
    )  # fmt: skip
    rows = []
    for i, contender in enumerate(figures.report["contenders"]):
        at = ("contenders", i)
        probe = (*at, "probes", "by_shots", shots)
        decode = _decode_row(contender)
        speed = (*at, "latency", decode if decode is not None else -1)
        rows.append(
            row_of(
                contender,
                contender_name(figures, i),
                figures.html("percent1", *at, "macs_fraction"),
                with_interval(figures, "f1", *at, "perplexity", "perplexity"),
                with_interval(figures, "times", *at, "perplexity", "ratio_to_dense"),
                with_interval(figures, "f3", *probe, "mean_hits_at_1"),
                with_interval(figures, "percent", *at, "probes", "retention", "retention"),
                figures.html("tokens/s", *speed, "tokens_per_s") if decode is not None else MISSING,
                figures.html("times", *speed, "speedup_same_engine")
                if decode is not None
                else MISSING,
                figures.html("MB", *at, "model_bytes"),
            )
        )
    note = (
        "Small print: 95 % bootstrap intervals over windows or queries; ratios are paired. "
        "On disk: as stored, whatever precision it computes in."
    )
    return table_of(heads, rows, note)


def language_table(figures: Figures) -> str:
    """Perplexity's companions: bits per byte, KL to the teacher, agreement with it."""
    heads = ("contender", "perplexity", "bits per byte", "KL to the teacher, nats/token",
             "same first choice as the teacher")  # fmt: skip
    rows = []
    for i, contender in enumerate(figures.report["contenders"]):
        if contender["perplexity"] is not None:
            at = ("contenders", i, "perplexity")
            cells = (
                with_interval(figures, style, *at, name)
                for style, name in (
                    ("f1", "perplexity"),
                    ("f3", "bits_per_byte"),
                    ("f3", "kl_nats_per_token"),
                    ("percent1", "same_first_choice"),
                )
            )
            rows.append(row_of(contender, contender_name(figures, i), *cells))
    if not rows:
        return ""
    counts = next(i for i, c in enumerate(figures.report["contenders"]) if c["perplexity"])
    tokens, size = (
        figures.html("count", "contenders", counts, "perplexity", key)
        for key in ("tokens", "bytes")
    )
    note = f"Over {tokens} scored tokens, {size} bytes of text; 95 % bootstrap over windows."
    return table_of(heads, rows, note)


def probe_tables(figures: Figures, places: Sequence[int]) -> str:
    """Accuracy by shots with the permuted control, and every task's accuracy and retention."""
    asked = sorted(
        {int(n) for i in places for n in figures.value("contenders", i, "probes", "by_shots")}
    )
    headline = str(figures.report["settings"]["headline_shots"])
    heads = [
        "contender",
        *(f"{n} shots" for n in asked),
        f"HITS@3, {headline} shots",
        f"exact match, {headline} shots",
        f"labels permuted, {headline} shots",
        "chance of that",
    ]
    rows = []
    for i in range(len(figures.report["contenders"])):
        if figures.value("contenders", i, "probes") is None:
            continue
        at: tuple[str | int, ...] = ("contenders", i, "probes")
        cells = [figures.html("f3", *at, "by_shots", str(n), "mean_hits_at_1") for n in asked]
        cells += [
            figures.html("f3", *at, "by_shots", headline, "mean_hits_at_3"),
            figures.html("f3", *at, "by_shots", headline, "mean_exact_match"),
            figures.html("f3", *at, "control", "mean_hits_at_1"),
            figures.html("f3", *at, "control", "mean_chance_hits_at_1"),
        ]
        rows.append(row_of(figures.report["contenders"][i], contender_name(figures, i), *cells))
    note = "HITS@1 unless said otherwise: mean over tasks of the share of queries answered right."
    return table_of(heads, rows, note) + _task_table(figures, places, headline)


def _task_table(figures: Figures, places: Sequence[int], shots: str) -> str:
    contenders = figures.report["contenders"]
    tasks = list(contenders[places[0]]["probes"]["by_shots"][shots]["tasks"])
    heads = ["task", *(str(contenders[i]["label"]) for i in places)]
    rows = []
    for task in tasks:
        cells = []
        for i in places:
            at: tuple[str | int, ...] = ("contenders", i, "probes")
            hits = figures.html("f2", *at, "by_shots", shots, "tasks", task, "hits_at_1")
            kept = with_interval(figures, "percent", *at, "retention", "tasks", task, "retention")
            cells.append(hits if contenders[i]["group"] == "dense" else f"{hits} · {kept}")
        rows.append(f"<tr><td>{escape(task)}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    note = "HITS@1, and for students the retention: their accuracy ÷ the dense original's."
    return table_of(heads, rows, note)


def settings_list(figures: Figures) -> str:
    names = {
        "text": ("text", "budget"),
        "windows": ("windows", "count"),
        "window, tokens": ("window_tokens", "count"),
        "stride, tokens": ("stride_tokens", "count"),
        "probe tasks": ("probe_tasks", "count"),
        "most queries a task": ("queries_per_task", "count"),
        "threads": ("threads", "count"),
        "timed rounds": ("rounds", "count"),
        "seed": ("seed", "count"),
    }
    items = [
        f"<dt>{escape(name)}</dt><dd>{figures.html(style, 'settings', key)}</dd>"
        for name, (key, style) in names.items()
    ]
    teacher = figures.html("budget", "teacher", "source")
    return f"<dl><dt>teacher</dt><dd>{teacher}</dd>{''.join(items)}</dl>"


def ceiling_list(figures: Figures) -> str:
    items = []
    for device, ceilings in figures.value("ceilings").items():
        at = ("ceilings", device)
        rates = ", ".join(
            f'<span class="fixed">{escape(name)}</span> '
            f"{figures.html('GFLOP/s', *at, 'matmul_operations_per_s', name)}"
            for name in ceilings["matmul_operations_per_s"]
        )
        bandwidth = figures.html("GB/s", *at, "memory_bytes_per_s")
        items.append(f"<dt>{escape(device)}: memory, reading</dt><dd>{bandwidth}</dd>")
        items.append(f"<dt>{escape(device)}: matmuls</dt><dd>{rates}</dd>")
    return f"<dl>{''.join(items)}</dl>" if items else ""


def seconds_list(figures: Figures) -> str:
    stages = ", ".join(
        f"{escape(name)} {figures.html('seconds', 'seconds', name)}"
        for name in figures.report["seconds"]
    )
    return f'<p class="small">This report took: {stages}.</p>'


def _decode_row(contender: Mapping[str, Any]) -> int | None:
    """Place of the decode timing at batch 1 behind the shortest prompt."""
    rows = [
        (row["prompt_tokens"], place)
        for place, row in enumerate(contender["latency"] or [])
        if row["kind"] == "decode" and row["batch"] == 1
    ]
    return min(rows)[1] if rows else None
