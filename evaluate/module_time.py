"""Compressed-module time alone: the target modules' matmuls as a bare ONNX stack, timed.

Dense and students run interleaved in one process under ONNX Runtime, on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from distill.plan import Decision, Plan
from evaluate.module_stack import layer_of, stack_inputs, stack_model
from evaluate.timing import Timed, interleaved_timings

DENSE_BYTES_LIMIT = 2**30
TOKEN_COUNTS = (1, 32, 256)


@dataclass(frozen=True)
class ModuleTimes:
    """Times of one stack: `rows` has one entry for each number of threads and tokens."""

    layers: int
    macs_fraction: Mapping[str, float]
    rows: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "macs_fraction": dict(self.macs_fraction),
            "rows": list(self.rows),
        }


def time_modules(
    plans: Mapping[str, Plan],
    *,
    rounds: int,
    threads: Sequence[int],
    token_counts: Sequence[int] = TOKEN_COUNTS,
    on_call: Callable[[], None] = lambda: None,
) -> ModuleTimes:
    """Time each plan's stack and the dense one of the same modules.

    Plans of one base model only. Where the dense stack would exceed 1 GiB, every contender runs
    the same evenly spaced layers, and `layers` says how many.
    """
    first = next(iter(plans.values()))
    chosen = timed_layers(first)
    stacks = {"dense": [dense_decision(d) for d in _of_layers(first, chosen)]}
    stacks |= {name: _of_layers(plan, chosen) for name, plan in plans.items()}
    dense_macs = sum(d.macs for d in stacks["dense"])
    fractions = {n: sum(d.macs for d in ds) / dense_macs for n, ds in stacks.items()}
    rows: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="evaluate-modules-") as folder:
        for name, decisions in stacks.items():
            path = Path(folder, _file(stacks, name))
            ir.save(stack_model(decisions), path, external_data=f"{path.name}.data")
        for count in threads:
            sessions = {n: _session(Path(folder, _file(stacks, n)), count) for n in stacks}
            for tokens in token_counts:
                rows += _rows(sessions, count, tokens, rounds, on_call)
    return ModuleTimes(len(chosen), fractions, tuple(rows))


def calls_of(plans: int, threads: int, rounds: int, token_counts: int = len(TOKEN_COUNTS)) -> int:
    """How many timed and warm-up calls `time_modules` makes."""
    return (plans + 1) * threads * token_counts * (rounds + 2)


def timed_layers(plan: Plan) -> list[int]:
    """All layers, or as many evenly spaced ones as keep the dense stack within 1 GiB."""
    layers = sorted({layer_of(d.module)[0] for d in plan.decisions})
    per_layer = 4 * plan.dense_macs / len(layers)
    count = max(1, min(len(layers), int(DENSE_BYTES_LIMIT // per_layer)))
    return [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]


def dense_decision(decision: Decision) -> Decision:
    """The same module kept dense."""
    rank = min(decision.out_features, decision.in_features)
    return replace(decision, action="keep", rank=rank, macs=decision.dense_macs)


def _of_layers(plan: Plan, layers: Sequence[int]) -> list[Decision]:
    wanted = set(layers)
    return [d for d in plan.decisions if layer_of(d.module)[0] in wanted]


def _file(stacks: Mapping[str, Any], name: str) -> str:
    return f"stack-{list(stacks).index(name)}.onnx"


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _rows(
    sessions: Mapping[str, Any], threads: int, tokens: int, rounds: int, on_call: Callable[[], None]
) -> list[dict[str, Any]]:
    """Timings of every stack at one number of threads and tokens, with speedups over dense."""

    def timed(session: Any) -> Timed:
        inputs = stack_inputs(session, tokens)
        return Timed(lambda _: session.run(None, inputs))

    timings, failures = interleaved_timings(
        {name: timed(session) for name, session in sessions.items()},
        rounds=rounds,
        warmup=2,
        on_call=on_call,
    )
    for error in failures.values():
        raise error
    dense = np.array(timings["dense"].samples_s)
    rows = []
    for name, timing in timings.items():
        ratios = dense / np.array(timing.samples_s)
        low, high = np.quantile(ratios, [0.05, 0.95])
        rows.append(
            {
                "stack": name,
                "threads": threads,
                "tokens": tokens,
                **timing.to_json(),
                "speedup": timings["dense"].median_s / timing.median_s,
                "speedup_p5": float(low),
                "speedup_p95": float(high),
            }
        )
    return rows
