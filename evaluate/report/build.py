"""The report as data: report.json, which the Markdown and HTML pages only show.

`evaluate/report/report_schema.json` documents every field; `evaluate.report.schema` checks it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distill.artifact import staged, write_json, write_manifest
from evaluate.contenders import Contender
from evaluate.perplexity import perplexity_ratio
from evaluate.prepare import Comparison
from evaluate.probe_suite import retention
from evaluate.report.markdown import markdown_page
from evaluate.report.page import html_page
from evaluate.report.pairs import paired_comparisons
from evaluate.report.schema import require_valid
from evaluate.report.verdict import verdicts

REPORT_SCHEMA = 1
BUSY_PERCENT = 15.0


def build_report(comparison: Comparison, argv: Sequence[str]) -> dict[str, Any]:
    """Everything measured, with derived figures and the verdict. Raises ValueError when a figure
    does not fit the documented schema."""
    args, found, text = comparison.args, comparison.lineup, comparison.text
    dense = _reference(comparison)
    report: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": f"{Path(found.teacher_source).name}: what the budget bought and what it cost",
        "command": shlex.join(argv),
        "reproduce": _commands(comparison, argv),
        "teacher": {"source": found.teacher_source, "fingerprint": found.teacher_fingerprint},
        "reference": None if dense is None else dense.id,
        "settings": {
            "quick": args.quick,
            "text": text.source,
            "text_sha256": text.sha256,
            "window_tokens": args.window,
            "stride_tokens": args.stride,
            "windows": len(text.windows),
            "probe_tasks": len(comparison.questions.tasks),
            "queries_per_task": args.queries,
            "headline_shots": comparison.questions.probes.headline,
            "threads": comparison.threads,
            "rounds": args.rounds,
            "seed": args.seed,
        },
        "machine": comparison.machine,
        "power": comparison.power,
        "ceilings": {device: c.to_json() for device, c in comparison.ceilings.items()},
        "contenders": [_contender_json(comparison, c, dense) for c in comparison.contenders],
        "comparisons": paired_comparisons(comparison.contenders, comparison.quality),
        "modules": None if comparison.modules is None else comparison.modules.to_json(),
        "plans": {
            c.run: c.plan.to_json()
            for c in comparison.contenders
            if c.plan is not None and c.group in ("budgeted", "svd")
        },
        "failures": [failure.to_json() for failure in comparison.failures],
        "notes": [*comparison.notes, *_busy(comparison)],
        "seconds": comparison.seconds,
    }
    report["verdict"] = verdicts(report)
    report = _plain(report)
    require_valid(report)
    return report


def write_report(directory: Path, report: dict[str, Any], argv: Sequence[str], parent: str) -> None:
    """Commit report.json, report.md and report.html as one artefact of kind "report"."""
    with staged(directory) as partial:
        write_json(partial / "report.json", report)
        (partial / "report.md").write_text(markdown_page(report), encoding="utf-8")
        (partial / "report.html").write_text(html_page(report), encoding="utf-8")
        write_manifest(
            partial,
            kind="report",
            parent=parent,
            argv=list(argv),
            seed=report["settings"]["seed"],
            measured={
                "contenders": len(report["contenders"]),
                "failures": len(report["failures"]),
                "seconds": report["seconds"],
                "verdict": report["verdict"],
            },
        )


def _reference(comparison: Comparison) -> Contender | None:
    """The dense original that ratios and retention refer to: PyTorch when it was measured."""
    dense = [c for c in comparison.contenders if c.group == "dense" and c.id in comparison.quality]
    return next((c for c in dense if c.engine == "pytorch"), dense[0] if dense else None)


def _contender_json(
    comparison: Comparison, contender: Contender, dense: Contender | None
) -> dict[str, Any]:
    entry = contender.to_json()
    quality = comparison.quality.get(contender.id)
    entry |= {"perplexity": None, "probes": None}
    if quality is not None:
        entry["perplexity"] = quality.windows.to_json()
        entry["probes"] = quality.probes.to_json()
        if dense is not None:
            base = comparison.quality[dense.id]
            against = perplexity_ratio(quality.windows, base.windows)
            entry["perplexity"]["ratio_to_dense"] = against["perplexity_ratio"]
            entry["perplexity"]["ratio_to_dense_interval95"] = against[
                "perplexity_ratio_interval95"
            ]
            entry["probes"]["retention"] = retention(quality.probes.headline, base.probes.headline)
    entry["footprint"] = comparison.footprints.get(contender.id)
    entry["latency"] = comparison.latency.get(contender.id)
    if entry["latency"]:
        entry["latency"] = [_with_speedup(comparison, contender, row) for row in entry["latency"]]
    return entry


def _with_speedup(
    comparison: Comparison, contender: Contender, row: dict[str, Any]
) -> dict[str, Any]:
    """Add the end-to-end speedup over the dense contender of the same engine and precision."""
    rows = [
        other
        for c in comparison.contenders
        if c.group == "dense"
        and (c.engine, c.precision, c.provider)
        == (contender.engine, contender.precision, contender.provider)
        for other in comparison.latency.get(c.id, [])
        if other["scenario"] == row["scenario"]
    ]
    speedup = row["tokens_per_s"] / rows[0]["tokens_per_s"] if rows else None
    return {**row, "speedup_same_engine": speedup}


def _commands(comparison: Comparison, argv: Sequence[str]) -> list[str]:
    """The commands that made the students, as their manifests recorded them, and this one."""
    from distill.artifact import read_json

    commands = []
    for run in comparison.lineup.runs:
        for manifest in sorted(run.glob("*/manifest.json")) + sorted(run.glob("*/*/manifest.json")):
            if manifest.parent.name.startswith(".") or "report" in manifest.parts:
                continue
            commands.append(shlex.join(read_json(manifest)["argv"]))
    return list(dict.fromkeys([*commands, shlex.join(argv)]))


def _busy(comparison: Comparison) -> list[str]:
    """A warning when other programs were running before or after the measurement."""
    busy = max(state.get("busy_percent", 0.0) for state in comparison.power.values())
    if busy <= BUSY_PERCENT:
        return []
    return [
        f"Other programs kept the processor {busy:.0f} % busy before or after: times are longer "
        "than this machine's best; ratios suffer less. Measure again when it is idle."
    ]


def _plain(value: Any) -> Any:
    """Tuples as lists and NumPy numbers as Python's, so that JSON gives back what was written."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return value.item()
    return value
