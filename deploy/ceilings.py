"""What this machine can do at best, measured without torch: memory read and matmul rates.

Every figure of `bench` is quoted with its fraction of the ceiling that these rates give.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.tiny_onnx import matmul_model
from distill.artifact import read_json

READ_BYTES = 2**28
MATMUL_SIZE = 1024
REPEATS = 7
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.125, "int4": 0.625}


@dataclass(frozen=True)
class MeasuredCeilings:
    """Bytes read a second, and operations (2 a MAC) a second of a square matmul, by precision.

    Weights of int4 are multiplied as int8 at best.
    """

    threads: int
    memory_bytes_per_s: float
    matmul_operations_per_s: dict[str, float]

    def matmul_flops_per_s(self, precision: str) -> float:
        """The rate a precision can reach, never below float32's, which it may fall back to."""
        name = "int8" if precision == "int4" else precision
        rates = self.matmul_operations_per_s
        return max(rates.get(name, 0.0), rates["fp32"])

    def best_of(self, other: MeasuredCeilings) -> MeasuredCeilings:
        """The higher of each two rates: what another user of the machine took from one
        measurement is no ceiling."""
        theirs = other.matmul_operations_per_s
        return MeasuredCeilings(
            self.threads,
            max(self.memory_bytes_per_s, other.memory_bytes_per_s),
            {name: max(rate, theirs[name]) for name, rate in self.matmul_operations_per_s.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "matmul_operations_per_s": self.matmul_operations_per_s,
        }


@dataclass(frozen=True)
class Work:
    """What one token costs: multiplications, and bytes of weights that must be read for it.

    The head is counted apart: a prompt needs it for its last position only. Embedding rows, norms,
    attention and the cache are left out, so the true ceiling is a little lower.
    """

    target_macs: int
    head_macs: int
    weight_bytes: float

    def floor_s(
        self, ceilings: MeasuredCeilings, precision: str, *, tokens: int, rows: int
    ) -> tuple[float, str]:
        """Least seconds of one pass over `tokens` positions of `rows` rows with logits for the
        last of each, and what bounds it: "memory" or "matmul"."""
        read_s = self.weight_bytes / ceilings.memory_bytes_per_s
        operations = 2 * (tokens * self.target_macs + rows * self.head_macs)
        compute_s = operations / ceilings.matmul_flops_per_s(precision)
        return (read_s, "memory") if read_s >= compute_s else (compute_s, "matmul")


def work_of(directory: Path, precision: str) -> Work | None:
    """The work of an engine directory, from the plan that it carries; None without one."""
    plan, config = directory / "plan.json", directory / "config.json"
    if not (plan.is_file() and config.is_file()):
        return None
    settings = read_json(config)
    target_macs = sum(int(d["macs"]) for d in read_json(plan)["decisions"])
    head_macs = int(settings["vocab_size"]) * int(settings["hidden_size"])
    size = BYTES_PER_WEIGHT[precision]
    return Work(target_macs, head_macs, size * (target_macs + head_macs))


def measure_ceilings(threads: int) -> MeasuredCeilings:
    """The best of seven of each; about a second. A kernel that is missing is left out."""
    rates = {}
    for precision, model in _matmuls().items():
        rate = _matmul_rate(model, precision, threads)
        if rate is not None:
            rates[precision] = rate
    return MeasuredCeilings(threads, read_rate(threads), rates)


def read_rate(threads: int, size_bytes: int = READ_BYTES) -> float:
    """Bytes a second that `threads` threads read of memory much larger than the caches."""
    parts = np.array_split(np.ones(size_bytes // 4, np.int32), threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_s(lambda: list(pool.map(np.max, parts)))
    return size_bytes / seconds


def _matmuls() -> dict[str, bytes]:
    """The matmul of each precision as ONNX Runtime runs it, with constant weights."""
    size = MATMUL_SIZE
    shape = (size, size)
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = np.random.default_rng(0).integers(-100, 100, shape).astype(np.int8)
    return {
        "fp32": matmul_model("MatMul", "float32", shape, ("float32", shape), {"w": weights}),
        "fp16": matmul_model(
            "MatMul", "float16", shape, ("float16", shape), {"w": weights.astype(np.float16)}
        ),
        "int8": matmul_model("MatMulInteger", "uint8", shape, ("int32", shape), {"w": whole}),
    }


def _matmul_rate(model: bytes, precision: str, threads: int) -> float | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions share no base of their own
        return None
    dtype = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}[precision]
    feed = {"x": np.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)}
    seconds = _best_s(lambda: session.run(None, feed))
    return 2 * MATMUL_SIZE**3 / seconds


def _best_s(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
