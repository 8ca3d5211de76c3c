"""The tables of docs/export.md, between their markers, from export, lowering and trt.json.

The words around them are written by hand; a table that was not measured says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.artifact import read_json

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "Not measured yet.\n"


def write_page(measured: Path, page: Path = PAGE) -> None:
    """Replace what stands between each pair of markers."""
    found = {
        name: trusted(read_json(path))
        for name in ("export", "lowering", "trt")
        if (path := measured / f"{name}.json").is_file()
    }

    def fill(match: re.Match[str]) -> str:
        source, make = TABLES[match[2]]
        lines = make(found[source]) if source in found else [MISSING.rstrip()]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    text = MARKED.sub(fill, page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")


def trusted(report: dict[str, Any]) -> dict[str, Any]:
    """Without rows of several threads that were timed while idle threads of others still spun."""
    if "rest_s" not in report and "modules" in report:
        for holder, key in ((report["modules"], "rows"), (report, "calls")):
            holder[key] = [row for row in holder[key] if row["threads"] == 1]
    return report


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def machine(report: Mapping[str, Any]) -> list[str]:
    about, libraries = report["machine"], report["machine"]["libraries"]
    shares = []
    for threads, rates in report["ceilings"].items():
        shares.append(
            f"{threads} thread(s): memory {rates['memory_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"fp32 matmul {rates['matmul_operations_per_s']['fp32'] / 1e9:.0f} GFLOP/s"
        )
    return [
        f"{about['processor']}, {about['logical_cores']} cores; load average {report['load']:.1f} "
        f"at the end; onnxruntime {libraries['onnxruntime']}. Ceilings measured in the same run: "
        f"{'; '.join(shares)}."
    ]


def parity(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for run, precisions in report["runs"].items():
        for precision, figures in precisions.items():
            proof = figures["parity"]
            rows.append(
                [
                    run,
                    precision,
                    f"{proof['max_logit_difference']:.2g}",
                    f"{proof['kl']:.2g}",
                    f"{proof['top1_agreement']:.2%}",
                    f"{proof['greedy_matches']}/{proof['greedy_steps']}",
                    f"{proof['cross_entropy_change']:+.4f}",
                    f"{proof['perplexity_ratio']:.3f}",
                    f"{figures['engine_bytes'] / 1e6:.0f}",
                ]
            )
    heads = (
        "run", "precision", "max logit difference", "KL, nats", "top-1", "greedy",
        "cross-entropy change, nats", "perplexity ratio", "MB",
    )  # fmt: skip
    return table(heads, rows)


def lowering_time(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for run, precisions in report["runs"].items():
        for precision, figures in precisions.items():
            rows.append(
                [
                    run,
                    precision,
                    figures["nodes"],
                    f"{figures['dense_matmuls']}/{figures['factored_matmuls']}/"
                    f"{figures['removed']}",
                    f"{figures['lowering_s']:.1f}",
                    f"{figures['parity']['seconds']:.0f}",
                    f"{figures['load_s']:.2f}",
                    f"{figures['load_unoptimised_s']:.2f}",
                ]
            )
    heads = (
        "run", "precision", "nodes", "dense or narrow/factored/removed", "lowering and saving, s",
        "parity gate, s", "load, s", "load of the graph before optimisation, s",
    )  # fmt: skip
    return table(heads, rows)


def modules(report: Mapping[str, Any]) -> list[str]:
    """Speedup beside the ideal 1 ÷ (MACs fraction), and how near each stack comes to a ceiling."""
    fractions = report["modules"]["macs_fraction"]
    rows = []
    for row in report["modules"]["rows"]:
        fraction = fractions[row["stack"]]
        seconds, macs = row["median_ms"] / 1e3, report["dense_macs"] * fraction
        ceiling = report["ceilings"][str(row["threads"])]
        compute = 2 * macs * row["tokens"] / seconds
        read = 4 * macs / seconds
        compute_share = compute / ceiling["matmul_operations_per_s"]["fp32"]
        read_share = read / ceiling["memory_bytes_per_s"]
        rows.append(
            [
                row["threads"],
                row["tokens"],
                row["stack"],
                f"{fraction:.3f}",
                f"{row['median_ms']:.2f} ({row['p5_ms']:.2f}–{row['p95_ms']:.2f})",
                f"{row['speedup']:.2f} ×",
                f"{row['speedup'] * fraction:.2f}",
                f"{compute / 1e9:.0f} ({compute_share:.0%})",
                f"{read / 1e9:.1f} ({read_share:.0%})",
            ]
        )
    heads = (
        "threads", "tokens", "modules of", "MACs fraction", "ms (5–95 %)", "speedup",
        "of the ideal", "GFLOP/s (of ceiling)", "weights read, GB/s (of ceiling)",
    )  # fmt: skip
    return table(heads, rows)


def overhead(report: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a stack as MACs ÷ a rate + matmuls × a time, fitted over the stacks."""
    fractions = report["modules"]["macs_fraction"]
    rows = []
    for threads, tokens in dict.fromkeys(
        (row["threads"], row["tokens"]) for row in report["modules"]["rows"]
    ):
        at = (threads, tokens)
        stacks = [r for r in report["modules"]["rows"] if (r["threads"], r["tokens"]) == at]
        macs = [report["dense_macs"] * fractions[row["stack"]] for row in stacks]
        nodes = [_matmuls(report, row["stack"]) for row in stacks]
        seconds = np.array([row["median_ms"] / 1e3 for row in stacks])
        terms = np.stack([macs, nodes], 1) / seconds[:, None]  # errors count by their share
        (per_mac, per_node), *_ = np.linalg.lstsq(terms, np.ones(len(stacks)), rcond=None)
        error = np.abs(terms @ [per_mac, per_node] - 1).max()
        shares = (
            f"{row['stack']} {per_node * node / second:.0%}"
            for row, node, second in zip(stacks, nodes, seconds, strict=True)
        )
        speed = f"{4 / per_mac / 1e9:.1f} GB/s" if tokens == 1 else ""
        speed = speed or f"{2 * tokens / per_mac / 1e9:.0f} GFLOP/s"
        cells = [threads, tokens, speed, f"{per_node * 1e6:.1f}", ", ".join(shares)]
        rows.append([*cells, f"{error:.0%}"])
    heads = (
        "threads", "tokens", "rate of the weights or the arithmetic", "µs a matmul besides",
        "share of the time that these are", "largest error of the fit",
    )  # fmt: skip
    return table(heads, rows)


def _matmuls(report: Mapping[str, Any], stack: str) -> int:
    """Matmul nodes of a stack, which shares first matmuls as the graph does."""
    return int(next(iter(report["runs"][stack].values()))["matmul_nodes"])


def calls(report: Mapping[str, Any]) -> list[str]:
    """One line for each precision and run; columns are the kinds of call."""
    by_key = {(r["run"], r["precision"], r["threads"], r["what"]): r for r in report["calls"]}
    kinds = list(dict.fromkeys((r["threads"], r["what"]) for r in report["calls"]))
    rows = []
    for precision in dict.fromkeys(r["precision"] for r in report["calls"]):
        for run in report["runs"]:
            cells = [precision, run]
            for kind in kinds:
                row = by_key[(run, precision, *kind)]
                dense = by_key[("dense", precision, *kind)]
                speedup = dense["median_ms"] / row["median_ms"]
                cells.append(f"{row['tokens_per_s']:,.0f} ({speedup:.2f} ×)")
            rows.append(cells)
    heads = ["precision", "run", *(f"{what}, {threads} thr." for threads, what in kinds)]
    return table(heads, rows)


def contenders(report: Mapping[str, Any], what: str) -> list[str]:
    rows = []
    for row in report["rows"]:
        if row["what"] == what:
            size = f"{row['batch']} × {row['new']} after {row['past']}"
            time = row.get("refused") or (
                f"{row['median_ms']:.2f} ({row['p5_ms']:.2f}–{row['p95_ms']:.2f})"
            )
            rows.append([row["threads"], size, row["contender"], time])
    return table(("threads", "sequences × new tokens after cached", "contender", "ms"), rows)


def plain(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in report.get("plain", ()):
        proof, wide = row["parity"], row["eight_bit_matrices"]
        rows.append(
            [
                row["student"],
                row["precision"],
                row["nodes"],
                "–" if wide is None else wide,
                f"{proof['max_logit_difference']:.2g}",
                f"{proof['kl']:.2g}",
                f"{proof['top1_agreement']:.2%}",
                f"{proof['cross_entropy_change']:+.4f}",
                f"{row['weight_bytes'] / 1e6:.0f}",
            ]
        )
    heads = (
        "student", "precision", "nodes", "matrices of 8 bits", "max logit difference", "KL, nats",
        "top-1", "cross-entropy change, nats", "MB",
    )  # fmt: skip
    return table(heads, rows) if rows else [MISSING.rstrip()]


def trt(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in report["rows"]:
        share = row.get("engine_bytes_of_dense")
        rows.append(
            [
                row["student"],
                row["precision"],
                len(row["targets"]),
                _build_seconds(row),
                f"{row['engine_bytes'] / 1e6:.1f}",
                "–" if share is None else f"{share:.1%}",
                "–" if row["peak_host_bytes"] is None else f"{row['peak_host_bytes'] / 2**30:.2f}",
                f"{row['estimated_host_bytes'] / 2**30:.2f}",
            ]
        )
    heads = (
        "student", "precision", "GPU generations", "build, s (range)", "engine, MB", "of dense",
        "peak memory, GiB", "estimated before, GiB",
    )  # fmt: skip
    return table(heads, rows)


def _build_seconds(row: Mapping[str, Any]) -> str:
    """Nothing where other work ran beside the build."""
    if row["build_seconds"] is None:
        return "–"
    low, high = row["build_seconds_range"]
    return f"{row['build_seconds']:.1f} ({low:.1f}–{high:.1f})"


TABLES = {
    "machine": ("export", machine),
    "parity": ("export", parity),
    "times": ("export", lowering_time),
    "modules": ("export", modules),
    "overhead": ("export", overhead),
    "calls": ("export", calls),
    "graphs": ("lowering", lambda report: contenders(report, "graph")),
    "attention": ("lowering", lambda report: contenders(report, "attention")),
    "trt": ("trt", trt),
    "plain": ("trt", plain),
}
