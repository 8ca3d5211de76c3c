"""docs/results.md and its pictures, from what scripts/measure_results.py measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from distill.artifact import read_json
from evaluate.report.charts import COLOURS
from evaluate.report.markdown import table
from evaluate.report.verdict import accuracy_of, speed_of

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "results"
PICTURES = ROOT / "docs" / "pictures"
PAGE = ROOT / "docs" / "results.md"
MARKERS = {"dense": "s", "lora": "D", "budgeted": "o", "svd": "^", "peer": "P"}
PUBLISHED = {"moderate": 1.74, "aggressive": 4.05}
DISTANCE = (
    "The paper reports 1.74 × for the compressed modules at the perplexity of standard LoRA, and",
    "4.05 × with moderate loss. Below stands, for each, the largest budget here whose modules are",
    "that fast, and what it costs. Where quality falls short of the claim, two differences are at",
    "hand: the model is small (135 M parameters, 576 wide), so a rank that halves the work leaves",
    "little to spare; and the training is short, of which the last table shows the trend. LoRA",
    "learns from the very model that it starts from, so it stays that model: its row is the dense",
    "original's.",
)


def write_page() -> None:
    """docs/results.md and its pictures from docs/measured/results/*.json."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Results, measured",
        "",
        "Written by `scripts/measure_results.py` from `docs/measured/results/*.json`; do not edit.",
    ]
    sweep_path = MEASURED / "sweep.json"
    if sweep_path.is_file():
        report = read_json(sweep_path)
        lines += [*_about(report), *_family(report), *_speeds(report), *_claims(report)]
        lines += [*_behaviour(report), *_against_svd(report), *_words(report)]
        _draw_pareto(report, PICTURES / "pareto.png")
        _draw_probes(report, PICTURES / "probes.png")
    else:
        lines += ["", "The sweep was not measured yet."]
    lines += _trend()
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _about(report: Mapping[str, Any]) -> list[str]:
    settings, machine = report["settings"], report["machine"]
    ceilings = report["ceilings"]["cpu"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.0f}" for name, rate in ceilings["matmul_operations_per_s"].items()
    )
    notes = [f"Note: {note}" for note in report["notes"]]
    failures = [f"Failed: {f['id']} ({f['stage']}): {f['message']}" for f in report["failures"]]
    return [
        "",
        f"Teacher: `{report['teacher']['source']}`. Training: "
        f"{report['training_tokens']:,} tokens of WikiText-2",
        "validation text (split by document) and synthetic few-shot lists. Perplexity: "
        f"{settings['windows']} windows of {settings['window_tokens']} tokens of",
        f"{settings['text'].replace(str(ROOT), '.')}. Probes: {settings['probe_tasks']} tasks of "
        f"up to {settings['queries_per_task']} queries, none in the training text.",
        f"Machine: {machine['processor']}, {machine['logical_cores']} cores, "
        f"{settings['threads']} threads; memory read "
        f"{ceilings['memory_bytes_per_s'] / 1e9:.1f} GB/s; matmul {rates} Gop/s.",
        "Intervals are 95 % bootstrap intervals.",
        *(["", *notes] if notes else []),
        *(["", *failures] if failures else []),
    ]


def _family(report: Mapping[str, Any]) -> list[str]:
    """Quality and size of every contender."""
    rows = []
    for c in report["contenders"]:
        if c["perplexity"] is None:
            continue
        ppl, probes = c["perplexity"], c["probes"]
        headline = probes["by_shots"][str(probes["headline_shots"])]
        kept = (probes.get("retention") or {}).get("retention")
        speed, footprint = speed_of(c), c["footprint"]
        rows.append(
            [
                c["label"],
                f"{c['macs_fraction']:.1%}",
                _ranged(ppl["perplexity"], ppl["perplexity_interval95"], 1),
                f"{ppl.get('ratio_to_dense', float('nan')):.2f} ×",
                f"{ppl['kl_nats_per_token']:.3f}",
                _ranged(headline["mean_hits_at_1"], headline["mean_hits_at_1_interval95"], 3),
                "–" if kept is None else f"{kept:.0%}",
                "–" if speed is None else f"{speed:,.0f}",
                "–" if c["model_bytes"] is None else f"{c['model_bytes'] / 1e6:.0f}",
                "–" if not footprint else f"{footprint['peak_memory_bytes'] / 1e6:,.0f}",
            ]
        )
    heads = (
        "contender", "target MACs", "perplexity", "÷ dense", "KL, nats/token", "10-shot HITS@1",
        "retention", "decode, tokens/s", "MB on disk", "peak memory, MB",
    )  # fmt: skip
    memory = (
        "Peak memory is that of a process which loads the model and answers one prompt of 256 "
        "tokens, its interpreter and libraries included."
    )
    picture = "![perplexity and accuracy against speed, bytes and MACs](pictures/pareto.png)"
    return ["", "## The family", "", *table(heads, rows), "", memory, "", picture]


def _speeds(report: Mapping[str, Any]) -> list[str]:
    modules = report["modules"]
    if modules is None:
        return []
    stacks = [s for s in modules["macs_fraction"] if s != "dense"]
    shapes = list(dict.fromkeys((r["threads"], r["tokens"]) for r in modules["rows"]))
    by_key = {(r["stack"], r["threads"], r["tokens"]): r for r in modules["rows"]}
    rows = [
        [
            stack,
            f"{modules['macs_fraction'][stack]:.1%}",
            *(
                f"{row['speedup']:.2f} × ({row['speedup_p5']:.2f}–{row['speedup_p95']:.2f})"
                for row in (by_key[(stack, *shape)] for shape in shapes)
            ),
        ]
        for stack in stacks
    ]
    heads = ["stack", "MACs", *(f"{threads} thr., {tokens} tok." for threads, tokens in shapes)]
    intro = (
        f"Speedup of the target modules alone over the dense ones: bare matmul stacks of "
        f"{modules['layers']} layers in ONNX Runtime fp32, interleaved in one process (median, "
        "5th to 95th percentile of the rounds)."
    )
    return ["", "## Compressed modules alone", "", intro, "", *table(heads, rows)]


def _claims(report: Mapping[str, Any]) -> list[str]:
    """The published claim beside the smallest budget cut that reaches its speedup here."""
    lines = ["", "## Against the published claim", "", *DISTANCE, ""]
    plain = {c["run"]: c for c in report["contenders"] if c["engine"] == "pytorch"}
    lora = next((c for c in plain.values() if c["group"] == "lora" and c["perplexity"]), None)
    for name, wanted in PUBLISHED.items():
        found = _first_at_least(report, wanted)
        if found is None or lora is None:
            lines.append(f"- {name}: no budget reached {wanted} ×, or LoRA was not measured.")
            continue
        run, speedups = found
        student = plain[run]
        lines.append(
            f"- {name}, {wanted} × in the paper: {run} ({student['macs_fraction']:.0%} of the MACs)"
            f" runs its modules at {speedups[len(speedups) // 2]:.2f} × (median over threads and "
            f"tokens; {speedups[0]:.2f} to {speedups[-1]:.2f} ×); perplexity "
            f"{student['perplexity']['perplexity']:.1f} against "
            f"{lora['perplexity']['perplexity']:.1f} of standard LoRA "
            f"({student['perplexity']['perplexity'] / lora['perplexity']['perplexity']:.2f} ×), "
            f"few-shot accuracy {accuracy_of(student):.3f} against {accuracy_of(lora):.3f}."
        )
    return lines


def _first_at_least(report: Mapping[str, Any], wanted: float) -> tuple[str, list[float]] | None:
    """The budgeted run of most MACs whose median speedup reaches `wanted`, and all its speedups,
    rising."""
    modules = report["modules"] or {"rows": [], "macs_fraction": {}}
    budgeted = {c["run"] for c in report["contenders"] if c["group"] == "budgeted"}
    for run in sorted(budgeted, key=lambda r: -modules["macs_fraction"].get(r, 0.0)):
        speedups = sorted(r["speedup"] for r in modules["rows"] if r["stack"] == run)
        if speedups and speedups[len(speedups) // 2] >= wanted:
            return run, speedups
    return None


def _behaviour(report: Mapping[str, Any]) -> list[str]:
    plain = [c for c in report["contenders"] if c["engine"] == "pytorch" and c["probes"]]
    rows = []
    for c in plain:
        probes = c["probes"]
        shots = {n: f"{r['mean_hits_at_1']:.3f}" for n, r in probes["by_shots"].items()}
        control = probes["control"]
        headline = probes["by_shots"][str(probes["headline_shots"])]
        rows.append(
            [
                c["label"],
                *shots.values(),
                f"{headline['mean_hits_at_3']:.3f}",
                f"{headline['mean_exact_match']:.3f}",
                "–" if control is None else f"{control['mean_hits_at_1']:.3f}",
            ]
        )
    counts = list(plain[0]["probes"]["by_shots"])
    heads = ["contender", *(f"{n} shots" for n in counts), "HITS@3", "exact match",
             "labels permuted"]  # fmt: skip
    pairs = [
        [
            pair["student"],
            pair["baseline"],
            _ranged(pair["perplexity_ratio"], pair["perplexity_ratio_interval95"], 2),
            _ranged(pair["hits_at_1_difference"], pair["hits_at_1_difference_interval95"], 3),
        ]
        for pair in report["comparisons"]
    ]
    pair_heads = ("student", "baseline", "perplexity ÷ baseline", "HITS@1 − baseline")
    picture = "![10-shot accuracy by task](pictures/probes.png)"
    return ["", "## Behaviour", "", *table(heads, rows), "", picture, "",
            "Paired, on the same windows and queries:", "", *table(pair_heads, pairs)]  # fmt: skip


def _against_svd(report: Mapping[str, Any]) -> list[str]:
    """At how many budgets the student is shown to be better than SVD with the same training."""
    groups = {c["id"]: c["group"] for c in report["contenders"]}
    pairs = [p for p in report["comparisons"] if groups[p["baseline"]] == "svd"]
    if not pairs:
        return []
    perplexity = sum((p["perplexity_ratio_interval95"] or [0, 2])[1] < 1 for p in pairs)
    probes = sum((p["hits_at_1_difference_interval95"] or [-1, 1])[0] > 0 for p in pairs)
    return [
        "",
        f"Against input-whitened SVD with the same training: better in perplexity at {perplexity} "
        f"of {len(pairs)} budgets, in few-shot accuracy at {probes} of {len(pairs)} (counted only "
        "where the paired 95 % interval leaves equal out). The students' closed-form refit is part "
        "of the method, and SVD goes without; students without it are in [distil.md](distil.md).",
    ]


def _words(report: Mapping[str, Any]) -> list[str]:
    return ["", "## Verdict", "", *(f"- **{v['kind']}**: {v['text']}" for v in report["verdict"])]


def _trend() -> list[str]:
    """Perplexity and accuracy of two budgets as tokens grow."""
    lines = [
        "",
        "## As training tokens grow",
        "",
        "The refit before training takes as many tokens, but never more than the family's.",
        "",
    ]
    rows = []
    for path in MEASURED.glob("trend-*.json"):
        report = read_json(path)
        tokens = report["training_tokens"]
        for c in report["contenders"]:
            if c["group"] == "budgeted" and c["engine"] == "pytorch" and c["perplexity"]:
                kept = c["probes"]["retention"]["retention"]
                rows.append(
                    [
                        f"{c['budget']:g}",
                        f"{tokens:,}",
                        f"{c['perplexity']['perplexity']:.1f}",
                        f"{c['perplexity']['ratio_to_dense']:.2f} ×",
                        f"{c['perplexity']['kl_nats_per_token']:.3f}",
                        f"{accuracy_of(c):.3f}",
                        "–" if kept is None else f"{kept:.0%}",
                    ]
                )
    rows.sort(key=lambda row: (-float(row[0]), int(row[1].replace(",", ""))))
    heads = ("F", "tokens", "perplexity", "÷ dense", "KL, nats/token", "HITS@1", "retention")
    return [*lines, *(table(heads, rows) if rows else ["Not measured yet."])]


def _draw_pareto(report: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12, 7), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)
    done = [c for c in report["contenders"] if c["perplexity"] and c["probes"]]
    costs = (
        ("decode tokens/s (batch 1)", speed_of),
        ("MB on disk", lambda c: c["model_bytes"] and c["model_bytes"] / 1e6),
        ("target-module MMACs a token", lambda c: c["target_macs_per_token"] / 1e6),
    )
    for column, (label, cost) in enumerate(costs):
        wants_plain = column == 2  # MACs belong to the plain models, speed and bytes to engines
        points = [
            (c, x) for c in done if (c["engine"] == "pytorch") == wants_plain and (x := cost(c))
        ]
        _scatter(axes[0][column], points, label, "perplexity", _perplexity_of)
        _scatter(axes[1][column], points, label, "10-shot HITS@1", accuracy_of)
        axes[0][column].set_yscale("log")
        for axis in (axes[0][column].xaxis, axes[1][column].xaxis, axes[0][column].yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    seen: dict[str, Any] = {}
    for line in (*axes[0][0].collections, *axes[0][2].collections):
        seen.setdefault(line.get_label(), line)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=5, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _scatter(
    axes: Axes, points: Sequence[tuple[Any, float]], x_label: str, y_label: str, height: Any
) -> None:
    for contender, x in points:
        group, solid = contender["group"], contender["precision"] == "fp32"
        colour = COLOURS[group]
        axes.scatter(
            x, height(contender), marker=MARKERS[group], s=42, label=group, edgecolors=colour,
            facecolors=colour if solid else "white",
        )  # fmt: skip
        name = f"{contender['budget']:g} " if group in ("budgeted", "svd") else ""
        axes.annotate(
            f"{name}{contender['precision']}", (x, height(contender)), fontsize=6,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.16)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#dddddd", linewidth=0.6)


def _draw_probes(report: Mapping[str, Any], path: Path) -> None:
    plain = [c for c in report["contenders"] if c["engine"] == "pytorch" and c["probes"]]
    shots = str(plain[0]["probes"]["headline_shots"])
    tasks = list(plain[0]["probes"]["by_shots"][shots]["tasks"])
    figure = Figure(figsize=(9, 0.34 * len(tasks) + 1.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for c in plain:
        hits = [c["probes"]["by_shots"][shots]["tasks"][t]["hits_at_1"] for t in tasks]
        axes.plot(
            hits, range(len(tasks)), MARKERS[c["group"]], color=COLOURS[c["group"]], ms=5,
            alpha=1.0 if c["group"] != "budgeted" else 0.35 + 0.65 * min(c["budget"], 1.0),
            label=c["label"].partition(" · ")[0],
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(f"{shots}-shot HITS@1 (fraction of queries)")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _perplexity_of(contender: Mapping[str, Any]) -> float:
    return float(contender["perplexity"]["perplexity"])


def _ranged(value: float, interval: Sequence[float] | None, places: int) -> str:
    if interval is None:
        return f"{value:.{places}f}"
    return f"{value:.{places}f} ({interval[0]:.{places}f} to {interval[1]:.{places}f})"
