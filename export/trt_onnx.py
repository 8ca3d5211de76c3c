"""The ONNX that TensorRT gets: checked external data, `logits_to_keep` as an input or baked, and
the two optimisation profiles.

The parser treats an input that has a default initializer as a constant, so the default "all" would
be built in. Without the initializer it is a real input, a shape tensor whose value the host gives,
and the head is computed for as many last positions as each call asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from distill.artifact import UserError, read_json
from export.external_data import external_data_files

MODEL = "model.onnx"
KEEP, LOGITS = "logits_to_keep", "logits"
FLOATS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
REMEDY = "write it again with: python -m export --run RUN --engine trt --overwrite"

Logits = Literal["input", "last", "all"]
Dimensions = tuple[int | str, ...]  # a number, or batch | sequence | past | total
Shapes = dict[str, dict[str, list[int]]]  # input -> "min" | "opt" | "max" -> dimensions or values


@dataclass(frozen=True)
class Limits:
    """Largest sizes of a call: sequences, new tokens of each, tokens in the cache before them."""

    max_batch: int
    max_seq: int
    max_past: int


@dataclass(frozen=True)
class Prepared:
    """A model ready for the parser; its weights stay in the files of its directory.

    `activations` is the type of the cache and the logits: "fp32", "fp16" or "bf16".
    """

    onnx_bytes: bytes
    inputs: Mapping[str, Dimensions]
    data_files: tuple[str, ...]
    operators: frozenset[str]
    logits: Logits
    activations: str


def prepare_onnx(directory: Path, logits: Logits) -> Prepared:
    """Read model.onnx without its weights and give it the wanted `logits_to_keep`.

    Args:
        logits: "input" (each call says how many positions get logits), "last" (one) or "all".
    Raises: UserError when the file is damaged or its external data lie outside `directory`.
    """
    path = directory / MODEL
    model = _read(path)
    files = tuple(file.relative_to(directory).as_posix() for file in external_data_files(path))
    if logits != "all":
        _replace_keep(model.graph, None if logits == "input" else 1, path)
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = {
        value.name: tuple(
            d.dim_param if d.HasField("dim_param") else d.dim_value
            for d in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in constants
    }
    operators = frozenset(node.op_type for node in model.graph.node)
    activations = _activations(model.graph, path)
    return Prepared(model.SerializeToString(), inputs, files, operators, logits, activations)


def context_limits(directory: Path, wanted: Limits) -> Limits:
    """`wanted`, cut to the context that the model's config.json allows."""
    path = directory / "config.json"
    context = read_json(path).get("max_position_embeddings")
    if not isinstance(context, int) or context < 2:
        raise UserError(
            f"{path} has max_position_embeddings {context!r}; needs a number above 1; {REMEDY}"
        )
    seq, past = min(wanted.max_seq, context), min(wanted.max_past, context - 1)
    return Limits(wanted.max_batch, seq, past)


def profiles_of(inputs: Mapping[str, Dimensions], limits: Limits) -> dict[str, Shapes]:
    """Two optimisation profiles over the named dimensions of every input.

    prefill: 1 to `max_seq` new tokens after 0 to `max_past` cached ones, tuned for half a prompt
    of one sequence and an empty cache. decode: one new token, tuned for `max_batch` sequences and
    a half-full cache.

    Raises: UserError when an input has a dimension of another name.
    """
    batch, seq, past = limits.max_batch, limits.max_seq, limits.max_past
    ends = {
        "prefill": {"min": (1, 1, 0), "opt": (1, (seq + 1) // 2, 0), "max": (batch, seq, past)},
        "decode": {"min": (1, 1, 0), "opt": (batch, 1, past // 2), "max": (batch, 1, past)},
    }
    return {
        name: {
            tensor: {
                end: _keep_value(end, sizes) if tensor == KEEP else _sized(tensor, dims, sizes)
                for end, sizes in corner.items()
            }
            for tensor, dims in inputs.items()
        }
        for name, corner in ends.items()
    }


def _keep_value(end: str, sizes: tuple[int, int, int]) -> list[int]:
    """A shape tensor's profile holds its values: 1 to every position, tuned for the last one."""
    return [sizes[1] if end == "max" else 1]


def _sized(tensor: str, dims: Dimensions, sizes: tuple[int, int, int]) -> list[int]:
    batch, sequence, past = sizes
    known = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
    strange = [d for d in dims if isinstance(d, str) and d not in known]
    if strange:
        raise UserError(
            f"{MODEL}: the input {tensor} has the dimension {strange[0] or '(unnamed)'}; needs "
            f"numbers or one of {' '.join(known)}; {REMEDY}"
        )
    return [known[d] if isinstance(d, str) else d for d in dims]


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); needs an ONNX; {REMEDY}") from None
    if not model.graph.node:
        raise UserError(f"{path} holds no graph; needs a decoder; {REMEDY}")
    return model


def _activations(graph: onnx.GraphProto, path: Path) -> str:
    logits = [value.type.tensor_type.elem_type for value in graph.output if value.name == LOGITS]
    if not logits or logits[0] not in FLOATS:
        raise UserError(f"{path} has no floating-point output {LOGITS}; needs one; {REMEDY}")
    return FLOATS[logits[0]]


def _replace_keep(graph: onnx.GraphProto, value: int | None, path: Path) -> None:
    """Drop the default of `logits_to_keep`; with a value, make it a constant of that value."""
    inputs = [value_info for value_info in graph.input if value_info.name == KEEP]
    defaults = [tensor for tensor in graph.initializer if tensor.name == KEEP]
    if not inputs:
        raise UserError(f"{path} has no input {KEEP}; needs one; {REMEDY}")
    for tensor in defaults:
        graph.initializer.remove(tensor)
    if value is not None:
        graph.input.remove(inputs[0])
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), KEEP))
