"""Where the time of a decode step goes, by kind of node: docs/measured/decode_profile.json.

    python scripts/profile_decode.py runs/f25/engine-ort/int4-cpu runs/f25/engine-ort/int8-cpu …

ONNX Runtime's own profile of one row with 256 cached tokens on one thread; of each node the least
time over all steps, which other load on the machine disturbs least. scripts/measure_deploy.py,
without arguments, then writes the table of docs/deploy.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deploy.engines import engine_name  # noqa: E402
from deploy.runner_ort import OrtRunner  # noqa: E402
from distill.artifact import read_json, write_json  # noqa: E402
from export.ort_session import SessionSettings, load_onnxruntime, session_options  # noqa: E402
from export.session import MODEL, SESSION, OrtModel  # noqa: E402

MEASURED = ROOT / "docs" / "measured" / "decode_profile.json"
CACHED = 256
ATTENTION = ("GroupQueryAttention", "Attention")
MATMULS = ("MatMul", "MatMulNBits", "Gemm", "FusedGemm")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="+", type=Path, help="engine-ort directories for the CPU")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    profiles = {engine_name(path): profile(path, args.steps) for path in args.engines}
    version = load_onnxruntime().__version__
    report = {"cached": CACHED, "steps": args.steps, "onnxruntime": version, "engines": profiles}
    write_json(MEASURED, report)
    print(json.dumps(report, indent=1))
    return 0


def profile(engine: Path, steps: int) -> dict[str, dict[str, float]]:
    """Kind of node -> how many there are and the milliseconds they take together."""
    with tempfile.TemporaryDirectory() as directory:
        model = profiled_model(engine, Path(directory) / "profile")
        runner = OrtRunner(model, threads=1)
        cache = runner.new_cache(1)
        runner.forward(np.full((1, CACHED), 5), cache, logits_to_keep=1)
        for _ in range(steps):
            cache = cache.truncate(CACHED)
            runner.forward(np.array([[5]]), cache, logits_to_keep=1)
        events = read_json(Path(model.session.end_profiling()))
    durations: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"], event["args"]["op_name"]].append(event["dur"])
    groups: dict[str, dict[str, float]] = defaultdict(lambda: {"nodes": 0, "ms": 0.0})
    for (name, kind), taken_us in durations.items():
        group = groups[group_of(name, kind)]
        group["nodes"] += 1
        group["ms"] += min(taken_us) / 1e3
    return dict(groups)


def profiled_model(engine: Path, prefix: Path) -> OrtModel:
    ort = load_onnxruntime()
    level = read_json(engine / SESSION)["graph_optimization_level"]
    options = session_options(SessionSettings(threads=1, graph_optimization_level=level))
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    session: Any = ort.InferenceSession(
        str(engine / MODEL), options, providers=["CPUExecutionProvider"]
    )
    return OrtModel(session, read_json(engine / "config.json"), engine)


def group_of(name: str, kind: str) -> str:
    if kind in MATMULS:
        return "head" if name.startswith("lm_head") else "target modules"
    return "attention" if kind in ATTENTION else "norms, rotary, activations and the rest"


if __name__ == "__main__":
    sys.exit(main())
