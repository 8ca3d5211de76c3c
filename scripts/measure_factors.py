"""Time interpolative students beside pairs of the same MACs, in ONNX Runtime.

    python scripts/measure_factors.py

Plans the real default model (no training) and times the bare stacks of modules; trains a short
student of each kind at F=0.25 and times its engines; all interleaved in one process. Writes
docs/measured/factors-time.json and factors-engines.json, which scripts/measure_distil.py shows in
docs/distil.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure_distil import MEASURED, ROOT, TEXT, processor

from distill.args import FACTORS
from distill.artifact import write_json
from distill.plan import Plan
from evaluate.module_time import time_modules

BUDGETS = (0.5, 0.25)
RUNS = ROOT / "runs" / "factors"
ROUNDS, THREADS = 21, (1, 2)
KEPT = (
    *("contender", "precision", "threads", "test", "weight_bytes"),
    *("tokens_per_s", "tokens_per_s_p5", "tokens_per_s_p95"),
)
PRECISIONS = ("int8", "int4")
SHORT = ("--tokens", "16384", "--refit-tokens", "0", "--statistics-tokens", "8192")


def plan_of(budget: float, factors: str) -> Plan:
    """The plan of the measured rows, which stops before training."""
    directory = RUNS / f"{factors}-{round(100 * budget)}"
    flags = ["--budget", str(budget), "--factors", factors, "--data", str(TEXT)]
    command = [sys.executable, "-m", "distill", "--run", str(directory), "--plan-only", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    return Plan.load(directory / "plan.json")


def run(*words: str) -> str:
    """What ``python -m`` with these words prints."""
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def engines_of(factors: str) -> Path:
    """The run folder of a short student with engines; what it learned does not change its time."""
    directory = RUNS / f"engines-{factors}"
    student = ["--budget", "0.25", "--factors", factors, "--data", str(TEXT), *SHORT]
    run("distill", "--run", str(directory), *student)
    run("export", "--run", str(directory), "--engine", "ort", "--precision", *PRECISIONS)
    return directory


def bench(directories: list[Path]) -> dict[str, Any]:
    """Tokens per second of every engine, in prefill of 256 tokens and decode of 64."""
    runs = [word for directory in directories for word in ("--run", str(directory))]
    engines = [word for precision in PRECISIONS for word in ("--engine", precision)]
    sizes = ["-p", "256", "-n", "64", "-t", "2", "-r", "15", "-o", "json"]
    return summary(json.loads(run("deploy", "bench", *runs, *engines, *sizes)))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    rows = [{key: row[key] for key in KEPT} for row in result["rows"]]
    return {"machine": processor(), "rows": rows}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plans = {f"{f}, F={b:g}": plan_of(b, f) for b in BUDGETS for f in FACTORS}
    times = time_modules(plans, rounds=ROUNDS, threads=THREADS).to_json()
    write_json(MEASURED / "factors-time.json", {**times, "machine": processor()})
    write_json(MEASURED / "factors-engines.json", bench([engines_of(f) for f in FACTORS]))


if __name__ == "__main__":
    main()
