"""What ``bench`` prints: a table in Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.devices import BASIS, predictions
from distill.units import number

COLUMNS = {
    "contender": "engine",
    "precision": "precision",
    "threads": "threads",
    "batch": "rows",
    "test": "test",
    "tokens_per_s": "tokens/s",
    "spread": "p5–p95",
    "ceiling_tokens_per_s": "ceiling",
    "ceiling_fraction": "of ceiling",
    "bound": "bound by",
}


def write_report(report: Mapping[str, Any], form: str) -> None:
    """Print rows on standard output; warnings go to standard error in every format."""
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    rows = report["rows"]
    if form == "json":
        print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    elif form == "csv":
        kept = [{k: v for k, v in row.items() if k != "samples_s"} for row in rows]
        _write_csv(kept)
    else:
        print(markdown([_shown(row) for row in rows], COLUMNS))
        print(f"\n{_footnote(report)}")


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of these columns (key: heading); cells as `distill.units.number` writes them."""
    lines = [f"| {' | '.join(columns.values())} |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(f"| {' | '.join(number(row.get(key)) for key in columns)} |")
    return "\n".join(lines)


def predictions_report(directory: Path, form: str) -> None:
    """Decode ceilings of every known device for this student; nothing is measured."""
    found = [p.to_json() for p in predictions(directory)]
    if form == "json":
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif form == "csv":
        _write_csv(found)
    else:
        columns = {
            "device": "device",
            "precision": "precision",
            "weight_bytes": "bytes of weights",
            "decode_ceiling_tokens_per_s": "decode ceiling, tokens/s (prediction)",
        }
        print(markdown(found, columns))
        print(f"\n{BASIS}")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = number(row["tokens_per_s_p5"]), number(row["tokens_per_s_p95"])
    share = row["ceiling_fraction"]
    fraction = None if share is None else f"{share:.0%}"
    return {**row, "spread": f"{low}–{high}", "ceiling_fraction": fraction}


def _footnote(report: Mapping[str, Any]) -> str:
    machine, parts = report["machine"], []
    for measured in report["ceilings"]:
        rates = ", ".join(
            f"{name} {rate / 1e9:.0f}" for name, rate in measured["matmul_operations_per_s"].items()
        )
        parts.append(
            f"{measured['threads']} threads read {measured['memory_bytes_per_s'] / 1e9:.1f} GB/s "
            f"and multiply at {rates} GFLOP/s"
        )
    power = report["power"]["before"].get("nvpmodel")
    where = machine["processor"] + (f", {power}" if power else "")
    return (
        f"{where}: {'; '.join(parts)}. Ceiling: weights read once a pass, or their "
        "multiplications, whichever takes longer; attention and cache left out."
    )


def _write_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
