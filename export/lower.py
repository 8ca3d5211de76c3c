"""A student as one static ONNX graph with a key/value cache: prefill and decode in one.

Direct emission over onnx_ir. Two flavours share all code but a few fused nodes: `ort` for ONNX
Runtime, `standard` for TensorRT and any other runtime (standard domain only).
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from distill import __version__
from distill.plan import Plan
from export.graph_check import LoweredCounts, check_lowered
from export.graph_config import read_architecture
from export.graph_decoder import Decoder
from export.graph_emitter import Emitter, Flavour, Precision
from export.graph_head import untie_head
from export.graph_linear import Linears
from export.graph_step import Step
from export.graph_structure import read_structure
from export.weights import Weights

__all__ = [
    "Flavour",
    "LoweredCounts",
    "Precision",
    "check_lowered",
    "lower",
    "save_onnx",
    "untie_head",
]

MODEL, DATA = "model.onnx", "model.onnx.data"
IR_VERSION = 10  # ONNX Runtime 1.22 and TensorRT 10.3 read it
ALIGNMENT_BYTES = 4096


def lower(
    student_directory: Path,
    *,
    flavour: Flavour,
    precision: Precision,
    share_inputs: bool = False,
) -> ir.Model:
    """The graph of a student; its weights are read from the directory when it is saved.

    Args:
        flavour: "ort" (fused nodes of ONNX Runtime) or "standard".
        precision: type of the weights, the cache and the logits.
        share_inputs: factored modules that read the same input share their down matmul.
    Raises: UserError when config.json, plan.json and the tensors do not fit together.
    """
    directory = Path(student_directory)
    architecture = read_architecture(directory)
    weights = Weights.open(directory)
    plan = Plan.load(directory / "plan.json")
    structure = read_structure(plan, weights, architecture)
    emitter = Emitter(weights, flavour, precision)
    step = Step(emitter, architecture)
    linears = Linears(emitter, step, structure, share_inputs=share_inputs)
    Decoder(emitter, step, linears, architecture).emit()
    model = ir.Model(
        emitter.graph,
        ir_version=IR_VERSION,
        producer_name="budgeted-lora",
        producer_version=__version__,
        domain="budgeted-lora",
        doc_string=f"{architecture.family} decoder, {flavour} flavour, {precision}",
    )
    check_lowered(model, plan)
    return model


def save_onnx(model: ir.Model, directory: Path) -> None:
    """Write model.onnx and, beside it, all its weights in model.onnx.data, at aligned offsets.

    Raises: UserError when a weight does not fit the graph's precision; OSError on a full disk.
    """
    ir.save(
        model,
        Path(directory) / MODEL,
        external_data=DATA,
        max_workers=min(4, os.cpu_count() or 1),
        alignment=ALIGNMENT_BYTES,
        align_threshold=0,
    )
