"""Time the modules of interpolative plans beside pairs of the same MACs, in ONNX Runtime.

    python scripts/measure_factors.py

Plans the real default model (no training), times the bare stacks interleaved in one process and
writes docs/measured/factors-time.json, which scripts/measure_distil.py shows in docs/distil.md.
"""

from __future__ import annotations

import subprocess
import sys

from measure_distil import MEASURED, ROOT, TEXT, processor

from distill.args import FACTORS
from distill.artifact import write_json
from distill.plan import Plan
from evaluate.module_time import time_modules

BUDGETS = (0.5, 0.25)
RUNS = ROOT / "runs" / "factors"
ROUNDS, THREADS = 21, (1, 2)


def plan_of(budget: float, factors: str) -> Plan:
    """The plan of the measured rows, which stops before training."""
    directory = RUNS / f"{factors}-{round(100 * budget)}"
    flags = ["--budget", str(budget), "--factors", factors, "--data", str(TEXT)]
    command = [sys.executable, "-m", "distill", "--run", str(directory), "--plan-only", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    return Plan.load(directory / "plan.json")


def main() -> None:
    plans = {f"{f}, F={b:g}": plan_of(b, f) for b in BUDGETS for f in FACTORS}
    times = time_modules(plans, rounds=ROUNDS, threads=THREADS).to_json()
    write_json(MEASURED / "factors-time.json", {**times, "machine": processor()})


if __name__ == "__main__":
    main()
