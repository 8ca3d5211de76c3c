"""The head of a graph as a matmul of its own, for tools that quantise MatMul nodes only.

Shapes: D hidden size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HEAD = "lm_head"
AROUND = ("rows", "sizes", "shape", "logits")  # what a tied head needs besides its Gemm


def untie_head(model: ir.Model) -> bool:
    """Replace the tied head, a Gemm on the embedding table [V, D], by a MatMul on [D, V].

    The new initializer is lm_head.weight and the node keeps its name, lm_head. Returns whether
    the head was tied.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    gemm = nodes.get(HEAD)
    if gemm is None or gemm.op_type != "Gemm":
        return False
    table, reshape = gemm.inputs[1], nodes[f"{HEAD}/logits"]
    assert table is not None and table.const_value is not None
    weight = _transposed(table.const_value)
    graph.register_initializer(weight)
    matmul = ir.node("MatMul", [nodes[f"{HEAD}/rows"].inputs[0], weight], name=HEAD)
    graph.insert_after(reshape, matmul)
    old, new = reshape.outputs[0], matmul.outputs[0]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name, new.shape, new.type, old.name = old.name, old.shape, old.type, None
    graph.remove([*(nodes[f"{HEAD}/{part}"] for part in AROUND), gemm], safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return True


def _transposed(stored: ir.TensorProtocol) -> ir.Value:
    """lm_head.weight [D, V] from the embedding table, read when the model is saved."""
    vocabulary, hidden = stored.shape.numpy()
    shape, name = ir.Shape([hidden, vocabulary]), f"{HEAD}.weight"

    def read() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(stored.numpy().T), stored.dtype)

    tensor = ir.LazyTensor(read, stored.dtype, shape, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(stored.dtype), const_value=tensor)
