"""Rewrite: attention that copies the cache into a longer one -> attention that appends in place.

GroupQueryAttention writes new keys and values into the tensor that it reads when the caller binds
`past_key_values.N.*` and `present.N.*` to one buffer of more columns than are cached; bound to
nothing it gives the longer copy that Attention gives. Inputs, outputs and their shapes stay.

Every row counts all columns, padding included, and the mask hides padding, as before. Several new
tokens behind a cache need `query_seqlens`, which ONNX Runtime knows from 1.32 on, on its CPU.
Shapes: B batch, S new tokens, P columns of the past, T columns in use, G key/value heads, D head
dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.session import IN_PLACE

MICROSOFT = "com.microsoft"
FIRST_RELEASE = (1, 32)
PREFIX = "in_place/"
NEEDED = {"q_num_heads", "kv_num_heads", "scale"}
HEAD_DIM_MULTIPLE = 8


def append_in_place(model_path: Path, release: str) -> bool:
    """Rewrite a saved graph of the ort flavour; its weights' file stays as it is.

    Args:
        release: version of the ONNX Runtime that is to run the graph.
    Returns whether it was rewritten: not for an older release, nor for attention of another form.
    """
    if _numbers(release) < FIRST_RELEASE:
        return False
    model = onnx.load(model_path, load_external_data=False)
    if not rewrite(model):
        return False
    onnx.save(model, model_path)
    return True


def rewrite(model: onnx.ModelProto) -> bool:
    """Put GroupQueryAttention in the place of every Attention; all of them or none.

    The model's metadata say that it was done (`IN_PLACE`).
    """
    graph = model.graph
    dead = _dead_caches(graph)
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    if len(dead) + 2 * len(attentions) != len(graph.output) - 1:
        return False
    if not all(_is_ours(node, graph) for node in attentions):
        return False
    nodes = _sizes(graph)
    for node in graph.node:
        if node.op_type == "Attention":
            nodes.append(_grouped(node))
        elif node.output[0] in dead:
            nodes += _zeros(node, dead[node.output[0]])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    if MICROSOFT not in {imported.domain for imported in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    helper.set_model_props(model, {**_properties(model), IN_PLACE: "1"})
    return True


def _is_ours(node: NodeProto, graph: Any) -> bool:
    """Whether all that an Attention does is what GroupQueryAttention does too."""
    has = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    cache = [value for value in graph.input if value.name in list(node.input)[4:6]]
    return (
        has.keys() >= NEEDED
        and not any(value for name, value in has.items() if name not in NEEDED)
        and len(node.input) == 6
        and len(node.output) == 3
        and len(cache) == 2
        and all(_head_dim(value) % HEAD_DIM_MULTIPLE == 0 for value in cache)
    )


def _grouped(node: NodeProto) -> NodeProto:
    query, key, value, mask, past_key, past_value = node.input
    has = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    sizes = [f"{PREFIX}last_B", f"{PREFIX}total"]
    inputs = [query, key, value, past_key, past_value, *sizes, "", "", "", mask, *[""] * 5]
    return helper.make_node(
        "GroupQueryAttention",
        [*inputs, f"{PREFIX}new_B"],
        list(node.output),
        name=node.name,
        domain=MICROSOFT,
        num_heads=has["q_num_heads"],
        kv_num_heads=has["kv_num_heads"],
        scale=has["scale"],
    )


def _sizes(graph: Any) -> list[NodeProto]:
    """Columns in use as GroupQueryAttention wants them: T - 1 [B], T, S [B], all int32."""
    constants = {"one": np.array([1], np.int64), "axis": np.array([0], np.int64)}
    graph.initializer.extend(
        numpy_helper.from_array(array, f"{PREFIX}{name}") for name, array in constants.items()
    )
    nodes = [
        _node("Shape", ["attention_mask"], "columns", start=1, end=2),
        _node("Shape", ["input_ids"], "rows", start=0, end=1),
        _node("Shape", ["input_ids"], "new", start=1, end=2),
        _node("Sub", [f"{PREFIX}columns", f"{PREFIX}one"], "last"),
    ]
    for name in ("columns", "last", "new"):
        nodes.append(_node("Cast", [f"{PREFIX}{name}"], f"{name}_32", to=TensorProto.INT32))
    for name in ("last", "new"):
        nodes.append(_node("Expand", [f"{PREFIX}{name}_32", f"{PREFIX}rows"], f"{name}_B"))
    return [*nodes, _node("Squeeze", [f"{PREFIX}columns_32", f"{PREFIX}axis"], "total")]


def _dead_caches(graph: Any) -> dict[str, NodeProto]:
    """Outputs that are a cache of zeros grown by zeros, of layers without attention, and the node
    that makes these zeros of a scalar."""
    outputs = {value.name for value in graph.output}
    made = {node.output[0]: node for node in graph.node if node.op_type == "Expand"}
    return {
        node.output[0]: made[node.input[1]]
        for node in graph.node
        if node.op_type == "Concat" and node.output[0] in outputs and node.input[1] in made
    }


def _zeros(concat: NodeProto, zeros: NodeProto) -> list[NodeProto]:
    """Zeros [B, G, max(P, T), D] in the place of a cache of zeros that grows by zeros."""
    past, base = concat.input[0], concat.output[0]
    parts = {"heads": (0, 2), "past": (2, 3), "size": (3, 4)}
    shapes = [
        _node("Shape", [past], f"{base}/{name}", start=start, end=end)
        for name, (start, end) in parts.items()
    ]
    heads, before, size = (f"{PREFIX}{base}/{name}" for name in parts)
    return [
        *shapes,
        _node("Max", [before, f"{PREFIX}columns"], f"{base}/longest"),
        _node("Concat", [heads, f"{PREFIX}{base}/longest", size], f"{base}/shape", axis=0),
        helper.make_node("Expand", [zeros.input[0], f"{PREFIX}{base}/shape"], [base], concat.name),
    ]


def _drop_unused(graph: Any) -> None:
    """Remove the nodes and constants that nobody reads any more."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    inputs = {value.name for value in graph.input}
    tensors = [t for t in graph.initializer if t.name in needed or t.name in inputs]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _node(kind: str, inputs: list[str], name: str, **attributes: Any) -> NodeProto:
    full = f"{PREFIX}{name}"
    return helper.make_node(kind, inputs, [full], full, **attributes)


def _head_dim(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.shape.dim[3].dim_value)


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])
