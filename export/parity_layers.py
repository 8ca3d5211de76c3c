"""Where a failing graph goes wrong: the first decoder block whose output differs from PyTorch's.

The graph is opened once more with every block's output added to its outputs, its weights staying
where they are, and runs the very calls that failed.

Shapes: B batch, S new tokens, K of them with logits, T tokens of a row, N real positions, D hidden.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.ort_session import SessionSettings, open_session
from export.parity_cases import Case
from export.parity_reference import Reference
from export.session import MODEL, OrtModel

BLOCK_OUTPUT = re.compile(r"model\.layers\.(\d+)/output")


def first_divergence(model: OrtModel, student: Reference, case: Case, limit: float) -> str:
    """In words: the first block of `case` whose output differs by more than `limit`.

    A block's difference is the largest, over the real tokens of the case, of
    |graph − PyTorch| ÷ |PyTorch|, Euclidean norms of the hidden state at one token.
    """
    if model.float_type == np.uint16:
        return "which block diverges first cannot be seen in bfloat16"
    names = block_outputs(model.directory / MODEL)
    errors = _block_errors(model, student, case, names)
    for layer in sorted(errors):
        if not errors[layer] <= limit:
            return (
                f"the first block that diverges is model.layers.{layer} "
                f"(relative error {errors[layer]:.2g}, {_before(errors, layer)})"
            )
    if not errors:
        return "no block's output could be found in the graph"
    return (
        f"no block diverges (largest relative error {max(errors.values()):.2g}), so the final norm "
        "or the head does"
    )


def block_outputs(model_path: Path) -> dict[int, str]:
    """Layer -> name of the value that holds its output, the sum that the next layer starts from."""
    graph = onnx.load(model_path, load_external_data=False).graph
    found = {}
    for node in graph.node:
        for name in node.output:
            if match := BLOCK_OUTPUT.fullmatch(name):
                found[int(match[1])] = name
    return found


def _before(errors: dict[int, float], layer: int) -> str:
    if layer == 0:
        return "with nothing but the embedding before it"
    return f"{errors[layer - 1]:.2g} before it"


def _block_errors(
    model: OrtModel, student: Reference, case: Case, names: dict[int, str]
) -> dict[int, float]:
    """Layer -> largest relative error over the real tokens of every row and call."""
    wanted = [student.block_outputs(row_T) if len(row_T) else [] for row_T in case.rows]
    errors = dict.fromkeys(names, 0.0)
    for states, call in zip(_hidden_states(model, case, names), case.calls, strict=True):
        for layer, hidden_BKD in states.items():
            kept = hidden_BKD.shape[1]  # the last block computes the positions with logits alone
            for b, expected in enumerate(wanted):
                if not expected:
                    continue
                real_K = call.real_BS[b, -kept:]
                expected_ND = expected[layer].numpy()[call.position_ids_BS[b, -kept:][real_K]]
                error = _relative_error(expected_ND, hidden_BKD[b][real_K])
                errors[layer] = max(errors[layer], error)
    return errors


def _relative_error(expected_ND: np.ndarray, got_ND: np.ndarray) -> float:
    """The largest of any position; infinite where a number is not finite."""
    lengths_N = np.linalg.norm(expected_ND, axis=-1) + 1e-12
    error_N = np.linalg.norm(got_ND - expected_ND, axis=-1) / lengths_N
    return float(np.nan_to_num(error_N, nan=np.inf).max(initial=0.0))


def _hidden_states(
    model: OrtModel, case: Case, names: dict[int, str]
) -> list[dict[int, np.ndarray]]:
    """Every call's block outputs [B, S, D] by layer."""
    session = _open_with(model, list(names.values()))
    past, hidden = None, []
    outputs = [*model.outputs[1:], *names.values()]
    for call in case.calls:
        feed = model.feed(
            call.input_ids_BS, call.attention_mask_BT, call.position_ids_BS, past, call.keep
        )
        results = session.run(outputs, feed)
        past = results[: len(model.outputs) - 1]
        states = [array.astype(np.float32) for array in results[len(past) :]]
        hidden.append(dict(zip(names, states, strict=True)))
    return hidden


def _open_with(model: OrtModel, names: list[str]) -> Any:
    """A session of the same graph with these values as further outputs."""
    graph = onnx.load(model.directory / MODEL, load_external_data=False)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    settings = SessionSettings(provider=model.provider)
    return open_session(model.directory / MODEL, settings, graph=graph.SerializeToString())
