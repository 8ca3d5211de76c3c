"""Load time and peak memory of one contender, each in a process of its own.

    python -m evaluate.footprint '{"engine": "ort", "provider": "cpu", "directory": …}'

The child opens the contender, runs one prompt and a few tokens, and prints what it took as JSON.
A contender that brings its process down is found out here, before it can harm the others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROMPT_TOKENS = 256
DECODED_TOKENS = 8
TIMEOUT_S = 600
LIBRARIES = {
    "pytorch": "evaluate.torch_runner",
    "ort": "onnxruntime",
    "trt": "deploy.runner_trt",
    "llama.cpp": "llama_cpp",
}


class ContenderCrashed(RuntimeError):
    """The child process ended without figures."""


def measure_footprint(contender: Any, threads: int) -> dict[str, Any]:
    """Load seconds, first-answer seconds and peak resident bytes, libraries imported beforehand and
    files in the page cache.

    Raises: ContenderCrashed with the last line the child wrote.
    """
    request = {
        "engine": contender.engine,
        "provider": contender.provider,
        "directory": None if contender.directory is None else str(contender.directory),
        "source": contender.source,
        "threads": threads,
    }
    command = [sys.executable, "-m", "evaluate.footprint", json.dumps(request)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=_child_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ContenderCrashed(f"no answer within {TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise ContenderCrashed(f"its process ended with {how}: {lines[-1][:300]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _child_environment() -> dict[str, str]:
    """The child finds this package wherever it is run from."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever an engine does not need stays out of this process, torch above all."""
    import numpy as np

    from evaluate.runners import greedy_step, open_contender, prefill

    directory = request["directory"]
    contender = SimpleNamespace(
        engine=request["engine"],
        provider=request["provider"],
        directory=None if directory is None else Path(directory),
        source=request["source"],
    )
    with contextlib.suppress(ImportError):  # opening it says what is missing
        importlib.import_module(LIBRARIES[contender.engine])
    before_bytes = peak_resident_bytes()
    began = time.perf_counter()
    runner = open_contender(contender, request["threads"])
    loaded = time.perf_counter()
    tokens = min(PROMPT_TOKENS, runner.max_context - DECODED_TOKENS)
    ids = np.random.default_rng(0).integers(5, runner.vocabulary - 1, (1, tokens))
    logits, cache = prefill(runner, ids)
    answered = time.perf_counter()
    token = logits[:, -1].argmax(-1)[:, None]
    for _ in range(DECODED_TOKENS):
        token = greedy_step(runner, token, cache)
    peak = peak_resident_bytes()
    return {
        "load_s": loaded - began,
        "first_answer_s": answered - began,
        "peak_memory_bytes": peak,
        "model_memory_bytes": peak - before_bytes,
        "prompt_tokens": tokens,
    }


def peak_resident_bytes() -> int:
    """Peak resident memory of this process alone (not of the one that started it)."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
