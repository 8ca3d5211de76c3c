"""One evaluation: compare, write the report, print its headline."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.artifact import UserError
from distill.console import table
from evaluate.args import EvaluateArgs
from evaluate.compare import compare
from evaluate.report.build import build_report, write_report
from evaluate.report.figures import Figures
from evaluate.report.verdict import speed_of


def evaluate(args: EvaluateArgs, argv: Sequence[str]) -> int:
    """Measure, write and print; returns 1 when some contender failed, else 0.

    Raises: UserError for what the user can put right, also when nothing at all could be measured.
    """
    comparison = compare(args)
    for failure in comparison.failures:
        print(f"failed: {failure.id} ({failure.stage}): {failure.message}", file=sys.stderr)
    if not comparison.quality:
        first = comparison.failures[0] if comparison.failures else None
        why = f"{first.id}: {first.message}" if first else "there is none"
        raise UserError(
            f"no contender could be measured ({why}); needs one that runs here; put that right"
        )
    report = build_report(comparison, argv)
    out = report_directory(args, comparison.lineup.runs)
    write_report(out, report, argv, comparison.lineup.parents[0])
    print_headline(report)
    print(f"report: {out / 'report.html'}")
    return 1 if comparison.failures else 0


def report_directory(args: EvaluateArgs, runs: Sequence[Path]) -> Path:
    """--out, else RUN/report for one run, else "report" beside the runs."""
    if args.out is not None:
        return Path(args.out)
    return runs[0] / "report" if len(runs) == 1 else runs[0].parent / "report"


def print_headline(report: Mapping[str, Any]) -> None:
    """The verdict and a table of all contenders on stdout."""
    figures = Figures(report)
    shots = str(report["settings"]["headline_shots"])
    rows = [
        [
            contender["label"],
            figures.plain("percent1", "contenders", i, "macs_fraction"),
            figures.plain("f1", "contenders", i, "perplexity", "perplexity"),
            figures.plain("f3", "contenders", i, "probes", "by_shots", shots, "mean_hits_at_1"),
            figures.plain("percent", "contenders", i, "probes", "retention", "retention"),
            None if (speed := speed_of(contender)) is None else f"{speed:,.0f}",
            figures.plain("MB", "contenders", i, "model_bytes"),
        ]
        for i, contender in enumerate(report["contenders"])
    ]
    heads = ["contender", "MACs", "perplexity", f"{shots}-shot HITS@1", "retention",
             "decode tokens/s", "on disk"]  # fmt: skip
    table("measured", heads, rows)
    for entry in report["verdict"]:
        print(f"{entry['kind']}: {entry['text']}")
