"""Measure the whole family on the real default model and write docs/results.md with its pictures.

    python scripts/measure_results.py sweep     # six budgets and the baselines, exported, compared
    python scripts/measure_results.py trend     # quality at two budgets as training tokens grow
    python scripts/measure_results.py           # only write the page from what was measured

Everything is made by `python -m evaluate` and read from its report.json; what is finished is not
run again, and a killed run goes on where it stopped. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distill.artifact import write_json  # noqa: E402
from scripts.results_page import MEASURED, write_page  # noqa: E402

TEXT = ROOT.parent / "shared" / "data" / "wikitext-2-valid.txt"
RUNS = ROOT / "runs" / "results"
BUDGETS = "1,0.75,0.5,0.35,0.25,0.15"
TOKENS = 102400
TREND_TOKENS = (25600, 102400, 409600)
TREND_BUDGETS = (0.5, 0.25)
THOROUGH = ["--windows", "16", "--queries", "60"]


def run_sweep(peer: bool, tokens: int, budgets: str, thoroughness: Sequence[str]) -> None:
    """The family of budgets, its baselines and all engines, in one report."""
    command = [sys.executable, "-m", "evaluate", "sweep", "--run", str(RUNS)]
    command += ["--budgets", budgets, "--tokens", str(tokens), "--data", str(TEXT)]
    command += [
        "--refit-tokens",
        str(tokens),
        *thoroughness,
        "--rounds",
        "15",
        *(["--peer", "llama.cpp"] if peer else []),
    ]
    _call(command)
    _keep(RUNS / "report", "sweep", tokens)


def run_trend(sweep_tokens: int, thoroughness: Sequence[str]) -> None:
    """Longer and shorter trainings of the same text, quality alone; the sweep's own are used. The
    refit takes as many tokens as training, but no more than the sweep's: further ones gave nothing.
    """
    for tokens in TREND_TOKENS:
        runs = []
        for budget in TREND_BUDGETS:
            name = f"b{100 * budget:.4g}"
            run = RUNS / (name if tokens == sweep_tokens else f"t{tokens}-{name}")
            runs.append(str(run))
            if (run / "student").is_dir():
                continue
            command = [sys.executable, "-m", "distill", "--run", str(run)]
            if (run / "request.json").is_file():
                command += ["--resume"]
            else:
                command += ["--budget", str(budget), "--tokens", str(tokens), "--data", str(TEXT)]
                command += ["--refit-tokens", str(min(tokens, sweep_tokens))]
            _call(command)
        out = RUNS / f"report-t{tokens}"
        _call(
            [sys.executable, "-m", "evaluate", "--run", *runs, "--quality-only", "--out", str(out)]
            + list(thoroughness)
        )
        _keep(out, f"trend-{tokens}", tokens)


def _keep(directory: Path, name: str, tokens: int) -> None:
    """Copy a report's figures into docs/measured/results, without the plans and the single tasks
    that the page does not show."""
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    report["plans"], report["training_tokens"] = {}, tokens
    for contender in report["contenders"]:
        _keep_headline(contender["probes"] or {"by_shots": {}})
    MEASURED.mkdir(parents=True, exist_ok=True)
    write_json(MEASURED / f"{name}.json", report)


def _keep_headline(probes: dict[str, Any]) -> None:
    """Single tasks at the headline's number of shots only."""
    for result in (*probes["by_shots"].values(), probes.get("control") or {}):
        if result.get("permuted_labels") or result.get("shots") != probes["headline_shots"]:
            result.pop("tasks", None)


def _call(command: Sequence[str]) -> None:
    """Run a step; 1 means that a contender failed, which the report shows."""
    status = subprocess.run(command, cwd=ROOT).returncode
    if status not in (0, 1):
        raise SystemExit(f"{' '.join(command[1:4])} ended with status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=["sweep", "trend", []])
    parser.add_argument("--peer", action="store_true", help="llama.cpp too (must be installed)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens of the sweep")
    parser.add_argument("--budgets", default=BUDGETS, help="budgets of the sweep")
    parser.add_argument("--short", action="store_true", help="evaluate's own windows and queries")
    args = parser.parse_args()
    thoroughness = [] if args.short else THOROUGH
    if "sweep" in args.parts:
        run_sweep(args.peer, args.tokens, args.budgets, thoroughness)
        write_page()
    if "trend" in args.parts:
        run_trend(args.tokens, thoroughness)
    write_page()


if __name__ == "__main__":
    main()
