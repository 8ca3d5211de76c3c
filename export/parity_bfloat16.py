"""A bfloat16 graph with its weights widened to float32, for providers without bfloat16 kernels.

ONNX Runtime's CPU provider has none (1.32: not even Add or MatMul). The widened graph has the same
nodes and the same rounded weights, so it proves structure and weights; what it cannot show is the
rounding of bfloat16 arithmetic, and the report says so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.external_data import external_data_files
from export.session import MODEL

WIDE, NARROW = TensorProto.FLOAT, TensorProto.BFLOAT16


def needs_widening(directory: Path, provider: str | None) -> bool:
    """Would the provider lack kernels for this graph? True on the CPU."""
    return provider in (None, "cpu")


def widened(directory: Path, copy: Path) -> Path:
    """Write `directory`'s graph to `copy` with float32 wherever it has bfloat16; returns `copy`."""
    external_data_files(directory / MODEL)
    model = onnx.load(directory / MODEL)
    graph = model.graph
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == NARROW:
            value.type.tensor_type.elem_type = WIDE
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == NARROW:
                attribute.i = WIDE
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
    onnx.save(model, copy / MODEL, save_as_external_data=True, location=f"{MODEL}.data")
    shutil.copy2(directory / "config.json", copy)
    return copy


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type != NARROW:
        return
    values = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
