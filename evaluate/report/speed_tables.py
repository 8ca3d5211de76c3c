"""The tables of report.html that hold times and memory."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.report.cells import contender_name, row_of, table_of
from evaluate.report.figures import Figures


def module_table(figures: Figures) -> str:
    """Times of the bare matmul stacks."""
    modules = figures.value("modules")
    if modules is None:
        return ""
    heads = ("stack", "MACs ÷ dense", "threads", "tokens", "median", "p5 to p95", "speedup",
             "speedup, p5 to p95")  # fmt: skip
    rows = []
    for i, row in enumerate(modules["rows"]):
        at = ("modules", "rows", i)
        cells = (
            figures.html("budget", *at, "stack"),
            figures.html("percent1", "modules", "macs_fraction", row["stack"]),
            figures.html("count", *at, "threads"),
            figures.html("count", *at, "tokens"),
            figures.html("ms", *at, "median_ms"),
            f"{figures.html('ms', *at, 'p5_ms')} to {figures.html('ms', *at, 'p95_ms')}",
            figures.html("times", *at, "speedup"),
            f"{figures.html('times', *at, 'speedup_p5')} to "
            f"{figures.html('times', *at, 'speedup_p95')}",
        )
        rows.append(row_of({"group": row["stack"]}, *cells))
    note = (
        "The target modules' matmuls and nothing else, in ONNX Runtime fp32, "
        f"{figures.html('count', 'modules', 'layers')} layers: this is the compressed-module "
        "speedup, which is not the end-to-end one below."
    )
    return table_of(heads, rows, note)


def latency_table(figures: Figures) -> str:
    """Every scenario of every contender with its ceiling."""
    contenders = figures.report["contenders"]
    scenarios = list(
        dict.fromkeys(row["scenario"] for c in contenders for row in c["latency"] or [])
    )
    tables = []
    for scenario in scenarios:
        found = [
            (i, place)
            for i, contender in enumerate(contenders)
            for place, row in enumerate(contender["latency"] or [])
            if row["scenario"] == scenario
        ]
        tables.append(_scenario_table(figures, found))
    return "".join(tables)


def _scenario_table(figures: Figures, found: Sequence[tuple[int, int]]) -> str:
    first = ("contenders", found[0][0], "latency", found[0][1])
    is_decode = figures.value(*first, "kind") == "decode"
    time_name = "time of the call" if is_decode else "time to first token"
    heads = ("contender", time_name, "p5 to p95", "tokens/s", "÷ dense, same engine",
             "of its ceiling", "ceiling", "bound by")  # fmt: skip
    rows = []
    for i, place in found:
        at = ("contenders", i, "latency", place)
        rows.append(
            row_of(
                figures.report["contenders"][i],
                contender_name(figures, i),
                figures.html("ms", *at, "median_ms"),
                f"{figures.html('ms', *at, 'p5_ms')} to {figures.html('ms', *at, 'p95_ms')}",
                figures.html("tokens/s", *at, "tokens_per_s"),
                figures.html("times", *at, "speedup_same_engine"),
                figures.html("percent", *at, "ceiling_fraction"),
                figures.html("tokens/s", *at, "ceiling_tokens_per_s"),
                figures.html("budget", *at, "bound"),
            )
        )
    batch, prompt, samples = (
        figures.html("count", *first, key) for key in ("batch", "prompt_tokens", "samples")
    )
    decoded = figures.html("count", *first, "decoded_tokens")
    what = f"Decode: {decoded} tokens each behind" if is_decode else "Prefill of"
    title = f"<h3>{what} {batch} × {prompt} tokens</h3>"
    note = (
        f"Median of {samples} interleaved rounds. Ceiling: what the measured memory bandwidth or "
        "matmul rate allows at best."
    )
    return title + table_of(heads, rows, note)


def footprint_table(figures: Figures) -> str:
    """Load time and memory, each contender in a process of its own."""
    heads = ("contender", "ready after", "first answer after", "peak memory", "of that, the model")
    rows = []
    for i, contender in enumerate(figures.report["contenders"]):
        if contender["footprint"] is None:
            continue
        at = ("contenders", i, "footprint")
        rows.append(
            row_of(
                contender,
                contender_name(figures, i),
                figures.html("seconds", *at, "load_s"),
                figures.html("seconds", *at, "first_answer_s"),
                figures.html("MB", *at, "peak_memory_bytes"),
                figures.html("MB", *at, "model_memory_bytes"),
            )
        )
    note = "Files in the page cache; the first answer is to one prompt. Python itself counts."
    return table_of(heads, rows, note) if rows else ""
