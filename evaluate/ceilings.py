"""The machine's ceilings for every runtime compared: the better of ONNX Runtime's and PyTorch's.

`deploy.ceilings` measures the memory and ONNX Runtime's matmuls; PyTorch's kernels may be faster,
and no contender should pass its ceiling. A GPU has ceilings of its own where PyTorch can reach it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch

from deploy.ceilings import READ_BYTES, MeasuredCeilings, read_rate
from deploy.ceilings import measure_ceilings as measure_deployed

MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_DTYPES = ("fp32", "bf16")


def measure_ceilings(threads: int) -> dict[str, MeasuredCeilings]:
    """Memory read rate and matmul rates by precision: of the CPU with `threads` threads and, where
    there is one, of the GPU."""
    torch.set_num_threads(threads)
    found = {"cpu": _cpu_ceilings(threads)}
    if torch.cuda.is_available():
        found["cuda"] = device_ceilings("cuda", threads)
    return found


def device_ceilings(device: str, threads: int) -> MeasuredCeilings:
    """What PyTorch reaches on a device."""
    values = torch.ones(READ_BYTES // 4, dtype=torch.int32, device=device)
    read_s = _best_s(values.max, device)
    rates = {name: _matmul_rate(dtype, device) for name, dtype in DTYPES.items()}
    return MeasuredCeilings(threads, READ_BYTES / read_s, rates)


def _cpu_ceilings(threads: int) -> MeasuredCeilings:
    rates: dict[str, float] = {}
    if importlib.util.find_spec("onnxruntime") is not None:
        deployed = measure_deployed(threads)
        read, rates = deployed.memory_bytes_per_s, dict(deployed.matmul_operations_per_s)
    else:
        read = read_rate(threads)
    for name in CPU_DTYPES:
        rates[name] = max(rates.get(name, 0.0), _matmul_rate(DTYPES[name], "cpu"))
    return MeasuredCeilings(threads, read, rates)


def _matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a square matmul in PyTorch, the best of several."""
    size = MATMUL_SIZE[device]
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best_s(lambda: a @ a, device)


def _best_s(call: Callable[[], Any], device: str) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
