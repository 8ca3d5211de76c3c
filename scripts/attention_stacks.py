"""The ways that ONNX Runtime has to compute cached attention, each as a bare stack of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph_config import Architecture

MICROSOFT = "com.microsoft"


def attention_stacks(a: Architecture, folder: Path) -> dict[str, Path]:
    """A bare stack of the model's attentions for every way of computing one."""
    files: dict[str, Path] = {}
    for kind in (
        "Attention, cache inside",
        "Attention, cache outside",
        "GroupQueryAttention",
        "GroupQueryAttention, attention_bias",
        "GroupQueryAttention, attention_bias, query_seqlens",
    ):
        files[kind] = folder / f"attention-{len(files)}.onnx"
        ir.save(attention_stack(a, kind), files[kind])
    return files


def attention_stack(a: Architecture, kind: str) -> ir.Model:
    """`a.layers` attentions, each fed with what the one before it gives; caches are outputs."""
    float32, int32 = ir.DataType.FLOAT, ir.DataType.INT32
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, MICROSOFT: 1}, name="attention")

    def given(name: str, shape: Sequence[int | str], dtype: ir.DataType = float32) -> ir.Value:
        graph.inputs.append(ir.val(name, dtype=dtype, shape=shape))
        return graph.inputs[-1]

    def op(name: str, *inputs: Any, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        node = ir.node(name, inputs, attributes, domain=domain, num_outputs=count)
        graph.append(node)
        return node.outputs if count > 1 else node.outputs[0]

    def const(name: str, values: Any, dtype: Any = np.int64) -> ir.Value:
        if name not in graph.initializers:
            tensor = ir.Tensor(np.array(values, dtype), name=name)
            graph.register_initializer(ir.Value(name=name, const_value=tensor))
        return graph.initializers[name]

    width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    x = given("x", ["batch", "sequence", width])
    new_k, new_v = (given(n, ["batch", "sequence", kv_width]) for n in ("new_k", "new_v"))
    mask = given("mask", ["batch", 1, "sequence", "total"])
    total = op("Cast", op("Shape", mask, start=3, end=4), to=int32)
    batch, length = op("Shape", x, start=0, end=1), op("Shape", x, start=1, end=2)
    last = op("Expand", op("Sub", total, const("one", [1], np.int32)), batch)
    lengths = op("Expand", op("Cast", length, to=int32), batch)
    scalar = op("Squeeze", total, const("axis", [0]))
    for layer in range(a.layers):
        past = [given(f"past_{n}{layer}", ["batch", a.kv_heads, "past", a.head_dim]) for n in "kv"]
        shift = const(f"shift{layer}", layer / 100, np.float32)  # or equal nodes become one
        k, v = op("Add", new_k, shift), op("Add", new_v, shift)
        if kind.startswith("GroupQuery"):
            extra = [None, None, None, mask] if "bias" in kind else []
            extra += [None] * 5 + [lengths] if "query_seqlens" in kind else []
            x, *present = op(
                "GroupQueryAttention", x, k, v, *past, last, scalar, *extra,
                count=3, domain=MICROSOFT, num_heads=a.heads, kv_num_heads=a.kv_heads,
            )  # fmt: skip
        elif kind.endswith("inside"):
            x, *present = op(
                "Attention", x, k, v, mask, *past,
                count=3, q_num_heads=a.heads, kv_num_heads=a.kv_heads,
            )  # fmt: skip
        else:
            split, swap = const("split", [0, 0, -1, a.head_dim]), [0, 2, 1, 3]
            q, k, v = (op("Transpose", op("Reshape", y, split), perm=swap) for y in (x, k, v))
            present = [op("Concat", old, y, axis=2) for old, y in zip(past, (k, v), strict=True)]
            y = op("Transpose", op("Attention", q, *present, mask), perm=swap)
            x = op("Reshape", y, const("join", [0, 0, width]))
        graph.outputs.extend(present)
    graph.outputs.append(x)
    for value in graph.outputs:
        value.type = ir.TensorType(float32)
    return ir.Model(graph, ir_version=10)
