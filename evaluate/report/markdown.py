"""report.md: the headline, the verdict and the main tables as plain Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluate.report.figures import MISSING, Figures
from evaluate.report.verdict import speed_of


def markdown_page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    figures = Figures(report)
    lines = [f"# {report['title']}", "", f"Written {report['created']} by `{report['command']}`."]
    if report["settings"]["quick"]:
        lines += ["", "**Quick look:** measure without `--quick` before deciding anything."]
    lines += [f"\n**Note:** {note}" for note in report["notes"]]
    lines += [f"\n**Failed:** {f['id']} ({f['stage']}): {f['message']}" for f in report["failures"]]
    lines += ["", "## Verdict", ""]
    lines += [f"- **{v['kind']}**: {v['text']}" for v in report["verdict"]]
    lines += ["", "## Headline", "", *_headline(figures)]
    if report["modules"] is not None:
        lines += ["", "## Compressed modules alone", "", *_modules(figures)]
    lines += ["", "## Whole-model speed", "", *_latency(figures)]
    lines += ["", "## Reproduce", "", "```", *report["reproduce"], "```", ""]
    return "\n".join(lines)


def _headline(figures: Figures) -> list[str]:
    shots = str(figures.report["settings"]["headline_shots"])
    rows = []
    for i, contender in enumerate(figures.report["contenders"]):
        at = ("contenders", i)
        probe = (*at, "probes", "by_shots", shots, "mean_hits_at_1")
        speed = speed_of(contender)
        rows.append(
            [
                str(contender["label"]),
                figures.plain("percent1", *at, "macs_fraction"),
                figures.plain("f1", *at, "perplexity", "perplexity")
                + figures.plain_interval("f1", *at, "perplexity", "perplexity_interval95"),
                figures.plain("times", *at, "perplexity", "ratio_to_dense"),
                figures.plain("f3", *probe)
                + figures.plain_interval("f3", *probe[:-1], "mean_hits_at_1_interval95"),
                figures.plain("percent", *at, "probes", "retention", "retention"),
                MISSING if speed is None else f"{speed:,.0f}",
                figures.plain("MB", *at, "model_bytes"),
                figures.plain("MB", *at, "footprint", "peak_memory_bytes"),
            ]
        )
    heads = (
        "contender", "target MACs ÷ dense", "perplexity (95 %)", "÷ dense",
        f"{shots}-shot HITS@1 (95 %)", "retention", "decode, tokens/s", "on disk", "peak memory",
    )  # fmt: skip
    return table(heads, rows)


def _modules(figures: Figures) -> list[str]:
    rows = []
    for i, row in enumerate(figures.report["modules"]["rows"]):
        at = ("modules", "rows", i)
        speedups = [figures.plain("times", *at, k) for k in ("speedup_p5", "speedup_p95")]
        rows.append(
            [
                str(row["stack"]),
                figures.plain("count", *at, "threads"),
                figures.plain("count", *at, "tokens"),
                figures.plain("ms", *at, "median_ms"),
                f"{figures.plain('times', *at, 'speedup')} ({speedups[0]} to {speedups[1]})",
            ]
        )
    return table(("stack", "threads", "tokens", "median", "speedup (p5 to p95)"), rows)


def _latency(figures: Figures) -> list[str]:
    rows = []
    for i, contender in enumerate(figures.report["contenders"]):
        for place, _ in enumerate(contender["latency"] or []):
            at = ("contenders", i, "latency", place)
            low, high = (figures.plain("ms", *at, key) for key in ("p5_ms", "p95_ms"))
            rows.append(
                [
                    str(contender["label"]),
                    figures.plain("budget", *at, "kind"),
                    figures.plain("count", *at, "batch"),
                    figures.plain("count", *at, "prompt_tokens"),
                    f"{figures.plain('ms', *at, 'median_ms')} ({low} to {high})",
                    figures.plain("tokens/s", *at, "tokens_per_s"),
                    figures.plain("times", *at, "speedup_same_engine"),
                    figures.plain("percent", *at, "ceiling_fraction"),
                ]
            )
    heads = ("contender", "", "batch", "prompt tokens", "median (p5 to p95)", "speed",
             "÷ dense, same engine", "of its ceiling")  # fmt: skip
    return table(heads, rows) if rows else ["Not measured."]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: words to the left, figures to the right."""
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
