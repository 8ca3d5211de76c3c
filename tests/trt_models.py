"""A hand-made decoder in plain ONNX operators, for tests of the TensorRT export without a student.

Shapes: B batch, S new tokens, P cached tokens, T = P + S, H heads, D head size, E = H * D.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from distill.artifact import write_manifest

LAYERS, HEADS, HEAD_SIZE, RANK, VOCABULARY, CONTEXT = 2, 2, 16, 8, 64, 512
HIDDEN = HEADS * HEAD_SIZE
ALL_POSITIONS = 2**31 - 1
LAST = np.iinfo(np.int64).max
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


class _Graph:
    """Nodes and constants, each `op` returning the name of its output."""

    def __init__(self, float_type: int) -> None:
        self.float_type = float_type
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def op(self, kind: str, out: str, *inputs: str, **attributes: Any) -> str:
        node = helper.make_node(kind, list(inputs), [out], name=f"/{out}", **attributes)
        self.nodes.append(node)
        return out

    def integers(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def floats(self, name: str, values: Any) -> str:
        dtype = helper.tensor_dtype_to_np_dtype(self.float_type)
        self.constants.append(numpy_helper.from_array(np.array(values).astype(dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.floats(name, 0.1 * self._random.standard_normal(shape))


def write_decoder(
    directory: Path,
    *,
    precision: str = "fp16",
    unsupported: str | None = None,
    manifest_flavour: str = "standard",
) -> Path:
    """Write an "onnx" artefact with the project's inputs and outputs; returns `directory`.

    Args:
        unsupported: name of an operator that TensorRT lacks, put before the head.
    """
    directory.mkdir(parents=True)
    graph = _Graph(FLOATS[precision])
    x = graph.op("Gather", "x0", graph.weight("embedding", VOCABULARY, HIDDEN), "input_ids")
    mask = _mask(graph)
    present = []
    for layer in range(LAYERS):
        x = _block(graph, layer, x, mask)
        present += [f"present.{layer}.{part}" for part in ("key", "value")]
    if unsupported is not None:
        x = graph.op(unsupported, "unsupported", x, domain="com.microsoft")
    start = graph.op("Neg", "start", "logits_to_keep")
    ends = (graph.integers("end", [LAST]), graph.integers("axis", [1]))
    kept = graph.op("Slice", "kept", x, start, *ends)
    graph.op("MatMul", "logits", kept, graph.weight("head", HIDDEN, VOCABULARY))
    _save(graph, directory, present, opset_of_microsoft=unsupported is not None)
    config = {"model_type": "llama", "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    seal(directory, precision=precision, flavour=manifest_flavour)
    return directory


def seal(directory: Path, *, precision: str = "fp16", flavour: str = "standard") -> None:
    """(Re)write the manifest over whatever the directory holds now."""
    (directory / "manifest.json").unlink(missing_ok=True)
    measured = {"flavour": flavour, "precision": precision}
    write_manifest(directory, kind="onnx", parent=None, argv=[], seed=0, measured=measured)


def _mask(graph: _Graph) -> str:
    """[B, 1, S, T]: 0 where a query may look, -1e4 elsewhere."""
    one = graph.integers("one", 1)
    places = graph.op("CumSum", "places", "attention_mask", one)
    keys = graph.op("Sub", "keys", places, one)
    keys = graph.op("Unsqueeze", "keys_4d", keys, graph.integers("axes12", [1, 2]))
    axes = graph.integers("axes13", [1, 3])
    causal = graph.op(
        "LessOrEqual", "causal", keys, graph.op("Unsqueeze", "queries", "position_ids", axes)
    )
    real = graph.op("Cast", "real", "attention_mask", to=TensorProto.BOOL)
    real = graph.op("Unsqueeze", "real_4d", real, "axes12")
    allowed = graph.op("And", "allowed", causal, real)
    return graph.op("Where", "mask", allowed, graph.floats("nothing", 0), graph.floats("low", -1e4))


def _block(graph: _Graph, layer: int, x: str, mask: str) -> str:
    """Attention with a factored query, dense key, value and output; x is [B, S, E]."""
    if layer == 0:
        graph.integers("split", [0, 0, HEADS, HEAD_SIZE])
        graph.integers("merge", [0, 0, HIDDEN])
        graph.floats("scale", HEAD_SIZE**-0.5)
    low = graph.op("MatMul", f"low{layer}", x, graph.weight(f"down{layer}", HIDDEN, RANK))
    q = graph.op("MatMul", f"q{layer}", low, graph.weight(f"up{layer}", RANK, HIDDEN))
    k = graph.op("MatMul", f"k{layer}", x, graph.weight(f"wk{layer}", HIDDEN, HIDDEN))
    v = graph.op("MatMul", f"v{layer}", x, graph.weight(f"wv{layer}", HIDDEN, HIDDEN))
    q, k, v = (_heads(graph, name) for name in (q, k, v))
    past = f"past_key_values.{layer}"
    k = graph.op("Concat", f"present.{layer}.key", f"{past}.key", k, axis=2)
    v = graph.op("Concat", f"present.{layer}.value", f"{past}.value", v, axis=2)
    turned = graph.op("Transpose", f"turned{layer}", k, perm=[0, 1, 3, 2])
    scores = graph.op("Mul", f"scaled{layer}", graph.op("MatMul", f"qk{layer}", q, turned), "scale")
    scores = graph.op("Add", f"masked{layer}", scores, mask)
    seen = graph.op("MatMul", f"seen{layer}", graph.op("Softmax", f"p{layer}", scores), v)
    seen = graph.op("Transpose", f"rows{layer}", seen, perm=[0, 2, 1, 3])
    seen = graph.op("Reshape", f"flat{layer}", seen, "merge")
    out = graph.op("MatMul", f"out{layer}", seen, graph.weight(f"wo{layer}", HIDDEN, HIDDEN))
    return graph.op("Add", f"x{layer + 1}", x, out)


def _heads(graph: _Graph, name: str) -> str:
    split = graph.op("Reshape", f"{name}_split", name, "split")
    return graph.op("Transpose", f"{name}_heads", split, perm=[0, 2, 1, 3])


def _save(graph: _Graph, directory: Path, present: list[str], opset_of_microsoft: bool) -> None:
    info = helper.make_tensor_value_info
    cache = ["batch", HEADS, "past", HEAD_SIZE]
    inputs = [
        info(name, TensorProto.INT64, ["batch", length])
        for name, length in (
            ("input_ids", "sequence"), ("attention_mask", "total"), ("position_ids", "sequence"),
        )
    ]  # fmt: skip
    for name in present:
        inputs.append(info(name.replace("present", "past_key_values"), graph.float_type, cache))
    inputs.append(info("logits_to_keep", TensorProto.INT64, [1]))
    graph.integers("logits_to_keep", [ALL_POSITIONS])
    outputs = [info("logits", graph.float_type, ["batch", "kept", VOCABULARY])]
    total = ["batch", HEADS, "total", HEAD_SIZE]
    outputs += [info(name, graph.float_type, total) for name in present]
    domains = ["", "com.microsoft"] if opset_of_microsoft else [""]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains],
        ir_version=10,
    )
    onnx.save_model(
        model,
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=100,
    )
