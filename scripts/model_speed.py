"""Whole models in ONNX Runtime, timed in turns: prefill and decode of every precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.timing import Timed, interleaved_timings
from export.session import OrtModel

PROMPT = 256
CALLS = {"prefill": (PROMPT, 0), "decode": (1, PROMPT)}  # new tokens, cached tokens


def time_models(
    runs: Mapping[str, Path],
    precisions: Sequence[str],
    threads: Sequence[int],
    rounds: int,
    on_call: Callable[[], None],
) -> list[dict[str, Any]]:
    """One row for every run, precision, number of threads and kind of call.

    The head gives the last position alone, as generation asks. Every contender of a number of
    threads takes turns with all others.
    """
    rows: list[dict[str, Any]] = []
    for count in threads:
        models = {
            (name, precision): OrtModel.open(
                run / "engine-ort" / f"{precision}-cpu", threads=count, verify=False
            )
            for name, run in runs.items()
            for precision in precisions
        }
        for what, (new, cached) in CALLS.items():
            contenders = {
                f"{name} {precision}": Timed(partial(_call, model, *_inputs(model, new, cached)))
                for (name, precision), model in models.items()
            }
            timings, failures = interleaved_timings(
                contenders, rounds=rounds, warmup=2, on_call=on_call
            )
            for error in failures.values():
                raise error
            for name, precision in models:
                timing = timings[f"{name} {precision}"]
                row = {"run": name, "precision": precision, "threads": count, "what": what}
                row |= {"tokens_per_s": new / timing.median_s, **timing.to_json()}
                print(f"{count} thread(s), {what}, {name} {precision}: {row['median_ms']:.2f} ms")
                rows.append(row)
    return rows


def _inputs(model: OrtModel, new: int, cached: int) -> tuple[Any, ...]:
    """Tokens, mask, positions and a random cache of one sequence."""
    generator = np.random.default_rng(0)
    ids_1S = generator.integers(3, model.vocabulary, (1, new))
    mask_1T = np.ones((1, cached + new), np.int64)
    positions_1S = np.arange(cached, cached + new)[None]
    shape = (1, model.kv_heads, cached, model.head_dim)
    past = [
        generator.standard_normal(shape, np.float32).astype(model.float_type)
        for _ in model.cache_inputs
    ]
    return ids_1S, mask_1T, positions_1S, past, 1


def _call(model: OrtModel, *inputs: Any) -> None:
    """`interleaved_timings` adds what its setup gave: nothing."""
    model.step(*inputs[:-1])
