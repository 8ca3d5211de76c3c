"""Contenders for the choices that lowering makes: flavours, shared matmuls, heads, attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from evaluate.timing import Timed, Timing, interleaved_timings
from export.graph_config import read_architecture
from export.lower import lower, save_onnx, untie_head
from scripts.attention_stacks import attention_stacks

GRAPHS: dict[str, dict[str, Any]] = {
    "ort": {"flavour": "ort", "share_inputs": True},
    "ort, no shared down matmuls": {"flavour": "ort"},
    "ort, untied head": {"flavour": "ort", "share_inputs": True, "untied": True},
    "standard": {"flavour": "standard"},
}
CALLS = ((1, 1, 256), (1, 32, 0), (1, 256, 0))  # batch, new tokens, cached tokens
ATTENTION_CALLS = (*CALLS, (4, 1, 256), (1, 32, 64), (4, 32, 64))


def measure_choices(
    students: Mapping[str, Path],
    folder: Path,
    threads: Sequence[int],
    rounds: int,
    clock: Callable[[], float],
    on_call: Callable[[], None],
) -> dict[str, Any]:
    """Seconds of lowering and saving every kind of graph, and the time of calls of each."""
    graphs, seconds = lowered_graphs(students, folder)
    stacks = attention_stacks(read_architecture(next(iter(students.values()))), folder)
    rows = []
    for count in threads:
        rows += timed(graphs, "graph", count, CALLS, rounds, clock, on_call)
        rows += timed(stacks, "attention", count, ATTENTION_CALLS, rounds, clock, on_call)
    return {"lowering": seconds, "rows": rows}


def lowered_graphs(
    students: Mapping[str, Path], folder: Path
) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """File of every student's graph of every kind, and the seconds that each took."""
    files: dict[str, Path] = {}
    seconds = []
    for run, student in students.items():
        for kind, options in GRAPHS.items():
            chosen = {k: v for k, v in options.items() if k != "untied"}
            directory = folder / f"{len(files)}"
            directory.mkdir()
            began_s = time.perf_counter()
            model = lower(student, precision="fp32", **chosen)
            lowered_s = time.perf_counter()
            if options.get("untied"):
                untie_head(model)
            save_onnx(model, directory)
            done_s = time.perf_counter()
            name = f"{run}: {kind}"
            files[name] = directory / "model.onnx"
            lower_s, save_s = lowered_s - began_s, done_s - lowered_s
            seconds.append(
                {"graph": name, "nodes": len(model.graph), "lower_s": lower_s, "save_s": save_s}
            )
            print(f"{name}: {len(model.graph)} nodes, {lower_s:.2f} + {save_s:.2f} s")
    return files, seconds


def timed(
    files: Mapping[str, Path],
    what: str,
    threads: int,
    calls: Sequence[tuple[int, int, int]],
    rounds: int,
    clock: Callable[[], float],
    on_call: Callable[[], None],
) -> list[dict[str, Any]]:
    """One row for every contender and size of call; a contender that refuses is recorded so."""
    sessions = {name: opened(file, threads) for name, file in files.items()}
    rows: list[dict[str, Any]] = []
    for batch, new, past in calls:
        runs = {}
        for name, session in sessions.items():
            inputs = inputs_of(session, batch, new, past)
            runs[name] = Timed(partial(called, session, inputs))
        timings, refused = interleaved_timings(
            runs, rounds=rounds, warmup=2, clock=clock, on_call=on_call
        )
        for name in runs:
            row = {"what": what, "contender": name, "threads": threads}
            row |= {"batch": batch, "new": new, "past": past}
            if name in refused:
                row["refused"] = str(refused[name]).splitlines()[0][-200:]
            else:
                record(row, timings[name])
            rows.append(row)
    return rows


def called(session: Any, inputs: Mapping[str, np.ndarray], _: object) -> None:
    session.run(None, inputs)


def record(row: dict[str, Any], timing: Timing) -> None:
    row |= timing.to_json()
    size = f"batch {row['batch']}, {row['new']} new, {row['past']} cached"
    print(f"{row['threads']} thread(s), {size}: {row['contender']} {row['median_ms']:.2f} ms")


def opened(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def inputs_of(session: Any, batch: int, new: int, past: int) -> dict[str, np.ndarray]:
    """Random inputs of a call, one position of logits asked for."""
    generator = np.random.default_rng(0)
    sizes = {"batch": batch, "sequence": new, "past": past, "total": past + new}
    whole: dict[str, np.ndarray] = {
        "input_ids": generator.integers(3, 300, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
        "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
    }
    for item in session.get_inputs():
        shape = [sizes.get(size, size) for size in item.shape]
        if item.name == "mask":
            allowed = np.tri(new, past + new, past, dtype=bool)
            whole["mask"] = np.broadcast_to(np.where(allowed, 0.0, -1e9), shape).astype(np.float32)
        elif item.name not in whole:
            whole[item.name] = generator.standard_normal(shape, np.float32)
    if any(item.name == "logits_to_keep" for item in session.get_overridable_initializers()):
        whole["logits_to_keep"] = np.array([1])
    names = {item.name for item in session.get_inputs()} | {"logits_to_keep"}
    return {name: array for name, array in whole.items() if name in names}
