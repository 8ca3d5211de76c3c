"""Measure the runtime beside llama.cpp and fill in the tables of docs/deploy.md.

    python scripts/measure_deploy.py --run runs/f25 --dense runs/dense --text wikitext-2-test.txt
    python scripts/measure_deploy.py            # only write the tables from what was measured

Speeds come from `python -m deploy bench`, whose contenders take turns in one process; perplexities
are of the same engines on the same windows; start-up is timed in processes of its own. The figures
of the server come from scripts/measure_server.py, those of a decode step from
scripts/profile_decode.py. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deploy.engines import engine_name, engines_of  # noqa: E402
from deploy.peer_llama import open_llama  # noqa: E402
from deploy.runner import Runner, open_runner  # noqa: E402
from deploy.text import Text, load_text  # noqa: E402
from distill.artifact import read_json, write_json  # noqa: E402
from distill.units import number  # noqa: E402

MEASURED = ROOT / "docs" / "measured"
PAGE = ROOT / "docs" / "deploy.md"
PEER = "llama.cpp"
PREFILL_GOAL, DECODE_GOAL, DENSE_GOAL = 6.0, 2.0, 1.0
PROMPT, DECODED, WINDOW = 256, 128, 512
IMPORT = (
    "import time; began = time.perf_counter()\n"
    "import deploy.generate, deploy.runner_ort, onnxruntime, tokenizers\n"
    "print(time.perf_counter() - began)"
)
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    args = arguments()
    if args.run is not None:
        write_json(MEASURED / "deploy.json", measure(args))
    write_page()
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Speeds, perplexities and start-up of a student's and a dense model's engines."""
    engines = {
        name: [e for e in engines_of(run) if e.parent.name == "engine-ort"]
        for name, run in (("student", args.run), ("dense", args.dense))
        if run is not None
    }
    everyone = [engine for found in engines.values() for engine in found]
    text = Path(args.text).read_text(encoding="utf-8")
    return {
        "engines": {name: [str(engine) for engine in found] for name, found in engines.items()},
        "bench": bench(everyone, args.threads, args.repetitions),
        "perplexity": perplexities(everyone, text, args.windows, args.threads),
        "text": Path(args.text).name,
        "startup": startup(engines["student"][0]),
        "load_1min": os.getloadavg()[0],
    }


def bench(engines: Sequence[Path], threads: int, repetitions: int) -> Any:
    flags = [flag for engine in engines for flag in ("--run", str(engine))]
    shape = ["-p", str(PROMPT), "-n", str(DECODED), "-t", str(threads), "-r", str(repetitions)]
    command = [sys.executable, "-m", "deploy", "bench", *flags, *shape]
    done = subprocess.run(
        [*command, "--peer", PEER, "-o", "json"], cwd=Path.cwd(), env=environment(),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def perplexities(
    engines: Sequence[Path], text: str, windows: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Of every engine and of llama.cpp: the first windows of the text, each token but a window's
    first."""
    tokenizer: Text = load_text(engines[0])
    ids = tokenizer.encode(text[: 12 * WINDOW * windows])[: WINDOW * windows]
    ids_NT = np.asarray(ids[: len(ids) // WINDOW * WINDOW], np.int64).reshape(-1, WINDOW)
    found = {}
    for engine in engines:
        runner = open_runner(engine, threads=threads)
        found[str(engine)] = scored(runner, ids_NT)
    peer = open_llama(None, threads=threads, context=WINDOW, all_logits=True)
    return {**found, PEER: scored(peer, ids_NT)}


def scored(runner: Runner, ids_NT: np.ndarray) -> dict[str, Any]:
    nll = 0.0
    for ids_T in ids_NT:
        logits_TV = runner.forward(ids_T[None], runner.new_cache(1))[0, :-1]
        highest_T1 = logits_TV.max(-1, keepdims=True)
        norm_T = np.log(np.exp(logits_TV - highest_T1).sum(-1)) + highest_T1[:, 0]
        nll += float((norm_T - logits_TV[np.arange(len(norm_T)), ids_T[1:]]).sum())
    runner.close()
    tokens = ids_NT.shape[0] * (WINDOW - 1)
    return {"perplexity": math.exp(nll / tokens), "tokens": tokens}


def startup(engine: Path) -> dict[str, Any]:
    """Seconds, each the median of five processes: the light runtime's import, and a whole
    `generate` of one token."""
    flags = ["generate", "--run", str(engine), "--max-tokens", "1", "--quiet", "Once"]

    def imported() -> float:
        return float(output([sys.executable, "-c", IMPORT]))

    def generated() -> float:
        began = time.perf_counter()
        output([sys.executable, "-m", "deploy", *flags])
        return time.perf_counter() - began

    return {
        "engine": engine_name(engine),
        "import_s": median_of(imported),
        "first_token_s": median_of(generated),
    }


def median_of(call: Callable[[], float]) -> float:
    return statistics.median(call() for _ in range(5))


def output(command: Sequence[str]) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# The page


def write_page(page: Path = PAGE, measured: Path = MEASURED) -> None:
    """Replace what stands between each pair of markers; a table not measured says so."""
    found = {
        name: read_json(path)
        for name in ("deploy", "server", "decode_profile")
        if (path := measured / f"{name}.json").is_file()
    }

    def fill(match: re.Match[str]) -> str:
        source, make = TABLES[match[2]]
        lines = make(found[source]) if source in found else ["Not measured yet."]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    page.write_text(MARKED.sub(fill, page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {page}")


def speed_lines(report: Mapping[str, Any]) -> list[str]:
    """One row a contender: both speeds, each over llama.cpp's, its ceiling's share, perplexity."""
    prompts, answers = (rows_of(report, test) for test in ("pp", "tg"))
    rows = []
    for key, prompt in prompts.items():
        cells = [prompt["contender"]]
        for row, peer in ((prompt, prompts[PEER]), (answers[key], answers[PEER])):
            share = row["ceiling_fraction"]
            cells += [
                f"{number(row['tokens_per_s'])} ({number(row['tokens_per_s_p5'])}–"
                f"{number(row['tokens_per_s_p95'])})",
                f"{row['tokens_per_s'] / peer['tokens_per_s']:.2f}",
                "-" if share is None else f"{share:.0%}",
            ]
        rows.append([*cells, report["perplexity"][key]["perplexity"]])
    heads = [
        "engine", f"prefill of {PROMPT}, tokens/s (p5–p95)", "÷ llama.cpp", "of ceiling",
        f"decode of {DECODED}, tokens/s (p5–p95)", "÷ llama.cpp", "of ceiling", "perplexity",
    ]  # fmt: skip
    machine, threads = report["bench"]["machine"], report["bench"]["ceilings"][0]["threads"]
    return [
        *table(heads, rows),
        "",
        f"{machine['processor']}, {threads} threads; load average {report['load_1min']:.1f} at the "
        f"end. Perplexity on the first {report['perplexity'][PEER]['tokens']:,} scored tokens of "
        f"{report['text']}, windows of {WINDOW}.",
    ]


def rows_of(report: Mapping[str, Any], test: str) -> dict[str, Mapping[str, Any]]:
    """Bench's rows of "pp" or "tg", by engine directory; llama.cpp's by its name."""
    rows = report["bench"]["rows"]
    return {row["directory"] or PEER: row for row in rows if row["test"].startswith(test)}


def goal_lines(report: Mapping[str, Any]) -> list[str]:
    """What was aimed at beside what came out; the best engine of each run for each figure."""
    rows = [
        ["student's prefill ÷ llama.cpp's", f"≥ {PREFILL_GOAL:g}", *best(report, "student", "pp")],
        ["student's decode ÷ llama.cpp's", f"≥ {DECODE_GOAL:g}", *best(report, "student", "tg")],
        ["dense decode ÷ llama.cpp's", f"≥ {DENSE_GOAL:g}", *best(report, "dense", "tg")],
        ["import of the light runtime, s", "≤ 0.5", report["startup"]["import_s"], "-"],
        [
            "first token of a cold generate, s",
            "≤ 2",
            report["startup"]["first_token_s"],
            report["startup"]["engine"],
        ],
    ]
    return table(["figure", "goal", "measured", "engine"], rows)


def best(report: Mapping[str, Any], model: str, test: str) -> list[Any]:
    """(the fastest engine's speed over llama.cpp's, its name)."""
    rows = rows_of(report, test)
    mine = [rows[engine] for engine in report["engines"].get(model, ())]
    if not mine:
        return ["not measured", "-"]
    fastest = max(mine, key=lambda row: row["tokens_per_s"])
    return [fastest["tokens_per_s"] / rows[PEER]["tokens_per_s"], fastest["contender"]]


def server_lines(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, streams in (("single", 1), ("many", report["clients"])):
        phase = report[name]
        gaps, first = phase["time_between_tokens_ms"], phase["time_to_first_token_ms"]
        cells = [gaps.get("p50"), gaps.get("p95"), first.get("p50"), first.get("p95")]
        row = [streams, phase["seconds"], phase["tokens_per_s"], *cells, phase["errors"]]
        rows.append([*row, phase["answers"]])
    heads = [
        "streams", "seconds", "tokens/s", "between tokens p50, ms", "p95", "first token p50, ms",
        "p95", "errors", "answers",
    ]  # fmt: skip
    memory = report["memory"]
    slope = memory.get("slope_mib_per_minute")
    return [
        *table(heads, rows),
        "",
        f"{report['speedup']:.2f} × the single stream. Resident memory {memory['start_mib']:.0f} "
        f"MiB after the ramp, {memory['end_mib']:.0f} MiB at the end; over the second half "
        f"{number(slope)} MiB a minute. `{' '.join(report['command'])}`; clients on the same "
        "machine.",
    ]


def profile_lines(report: Mapping[str, Any]) -> list[str]:
    """Milliseconds of each kind of node, an engine a column."""
    engines = report["engines"]
    kinds = list(dict.fromkeys(kind for groups in engines.values() for kind in groups))
    none = {"nodes": 0, "ms": 0.0}
    rows = []
    for kind in kinds:
        groups = [found.get(kind, none) for found in engines.values()]
        cells = [f"{group['ms']:.2f} ms ({group['nodes']} nodes)" for group in groups]
        rows.append([kind, *cells])
    totals = [sum(group["ms"] for group in found.values()) for found in engines.values()]
    rows.append(["together", *(f"{total:.2f} ms" for total in totals)])
    return [
        *table(["", *engines], rows),
        "",
        f"One thread, {report['cached']} cached tokens, least time of each node over "
        f"{report['steps']} steps; ONNX Runtime {report['onnxruntime']}.",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(number(cell) for cell in line)} |" for line in lines]


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "goals": ("deploy", goal_lines),
    "speed": ("deploy", speed_lines),
    "server": ("server", server_lines),
    "profile": ("decode_profile", profile_lines),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="run folder of the student, with its engines")
    parser.add_argument("--dense", type=Path, help="run folder of the dense model's engines")
    parser.add_argument("--text", help="UTF-8 text of the perplexities")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    if args.run is not None and args.text is None:
        parser.error("--run needs --text FILE for the perplexities")
    return args


if __name__ == "__main__":
    sys.exit(main())
