"""A standard graph in plain operators, for TensorRT releases whose parser knows no others.

ONNX's `Attention`, `RMSNormalization` and `RotaryEmbedding` (opset 23) and `Gelu` (opset 20) become
what they stand for; everything else, weights included, stays as it is. ONNX's own inliner does the
same in 5,800 nodes for SmolLM2-135M where this takes 2,600, and it copies every key and value for
each query head that shares them; here those heads' queries become rows of one product instead.

Shapes: B batch, S new tokens, T columns of the cache, H query heads, G key/value heads, R = H ÷ G,
D head dimension.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MODEL = "model.onnx"
OPSET, OPSET_OF_BLOCKS = 19, 21
"""DequantizeLinear has scales for blocks from opset 21 on: int4 alone needs them."""

PARSED = frozenset(
    "Add And Cast Concat Cos DequantizeLinear Div Erf Expand Gather Gemm Greater LessOrEqual "
    "MatMul Mul Neg Range ReduceMean Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze "
    "Sub Tanh Transpose Unsqueeze Where".split()
)
"""Of docs/operators.md in onnx-tensorrt as of TensorRT 9.2 ("operators up to Opset 19"): those that
plain graphs may hold. docs/Changelog.md takes none of them away up to 10.3; 10.0 adds INT4."""


def write_plain(source_directory: Path, directory: Path) -> int:
    """Write the plain form of a standard model.onnx, to be read beside the same data files.

    Returns its number of nodes. Raises: ValueError for an operator that has no plain form.
    """
    model = onnx.load_model(source_directory / MODEL, load_external_data=False)
    result = plain_model(model)
    (directory / MODEL).write_bytes(result.SerializeToString())
    return len(result.graph.node)


def plain_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in the operators of `PARSED`, for opset 19 (21 where weights have blocks).

    Raises: ValueError for an operator that has no plain form.
    """
    graph = _Plain(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:], result.opset_import[:]
    result.graph.node.extend(graph.nodes)
    result.graph.initializer.extend(graph.constants.values())
    blocks = any(a.name == "block_size" for node in graph.nodes for a in node.attribute)
    result.opset_import.append(helper.make_opsetid("", OPSET_OF_BLOCKS if blocks else OPSET))
    strange = sorted({node.op_type for node in graph.nodes} - PARSED)
    if strange or any(node.domain for node in graph.nodes):
        raise ValueError(f"{', '.join(strange) or 'a node of another domain'} has no plain form")
    return result


class _Plain:
    """The nodes of one model, those that older parsers lack spelled out."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._types = _tensor_types(model)
        self._made: set[str] = set()
        expand = {
            "Attention": self._attention,
            "RMSNormalization": self._rms_norm,
            "RotaryEmbedding": self._rotary,
            "Gelu": self._gelu,
        }
        for node in model.graph.node:
            expand.get(node.op_type, self.nodes.append)(node)

    def _attention(self, node: onnx.NodeProto) -> None:
        """softmax(q · scale · kᵀ + mask) · v, the softmax in float32; q_BHSD, k_BGTD, v_BGTD."""
        q, k, v, mask = node.input
        name, attributes = node.name, _attributes(node, {"scale"})
        heads, size, kv_heads = self._sizes(q)[1], self._sizes(k)[3], self._sizes(k)[1]
        scale = self._number("scale", attributes.get("scale", 1 / math.sqrt(size)), q)
        rows = self._op("Mul", f"{name}/scaled", q, scale)
        if heads != kv_heads:
            shape = self._integers("grouped_heads", [0, kv_heads, -1, size])
            rows = self._op("Reshape", f"{name}/grouped", rows, shape)
        turned = self._op("Transpose", f"{name}/keys", k, perm=[0, 1, 3, 2])
        scores = self._wide(self._op("MatMul", f"{name}/scores", rows, turned), q)
        masked = self._op("Add", f"{name}/masked", scores, self._mask(mask, q, heads // kv_heads))
        weights = self._op("Softmax", f"{name}/softmax", masked, axis=-1)
        weights = self._narrow(weights, q)
        if heads == kv_heads:
            self._op("MatMul", node.output[0], weights, v)
            return
        mixed = self._op("MatMul", f"{name}/mixed", weights, v)
        shape = self._integers("all_heads", [0, heads, -1, size])
        self._op("Reshape", node.output[0], mixed, shape)

    def _mask(self, mask: str, like: str, repeats: int) -> str:
        """[B, 1, R · S, T] in float32: one row for every query of a group, made once."""
        wide = self._wide(mask, like)
        if repeats == 1:
            return wide
        return self._op("Concat", f"{mask}/grouped", *[wide] * repeats, axis=2)

    def _rms_norm(self, node: onnx.NodeProto) -> None:
        """x ÷ sqrt(mean(x²) + epsilon) · scale, over the last axis, in the type of x."""
        x, weight = node.input
        name, attributes = node.output[0], _attributes(node, {"axis", "epsilon"})
        assert attributes.get("axis", -1) == -1
        epsilon = self._number("epsilon", attributes.get("epsilon", 1e-5), x)
        square = self._op("Mul", f"{name}/square", x, x)
        axes = self._integers("last_axis", [-1])
        mean = self._op("ReduceMean", f"{name}/mean", square, axes, keepdims=1)
        root = self._op("Sqrt", f"{name}/root", self._op("Add", f"{name}/above", mean, epsilon))
        unit = self._op("Div", f"{name}/unit", x, root)
        self._op("Mul", name, unit, weight)

    def _rotary(self, node: onnx.NodeProto) -> None:
        """x_BHSD, halves (a, b), becomes (a · cos − b · sin, b · cos + a · sin)."""
        x, cos, sin = node.input
        name = node.output[0]
        _attributes(node, set())
        half = self._sizes(x)[3] // 2
        first, second = f"{name}/first", f"{name}/second"
        sizes = self._integers("halves", [half, half])
        self.nodes.append(
            helper.make_node("Split", [x, sizes], [first, second], f"{name}/split", axis=-1)
        )
        minus = self._op("Neg", f"{name}/minus", second)
        crossed = self._op("Concat", f"{name}/crossed", minus, first, axis=-1)
        straight = self._op("Mul", f"{name}/straight", x, self._table(cos))
        across = self._op("Mul", f"{name}/across", crossed, self._table(sin))
        self._op("Add", name, straight, across)

    def _table(self, half: str) -> str:
        """cos or sin [B, S, D ÷ 2] as [B, 1, S, D], made once."""
        full = self._op("Concat", f"{half}/both_halves", half, half, axis=-1)
        return self._op("Unsqueeze", f"{half}/table", full, self._integers("head_axis", [1]))

    def _gelu(self, node: onnx.NodeProto) -> None:
        """x · Φ(x) ≈ x ÷ 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), or exactly by erf."""
        x, name = node.input[0], node.output[0]
        attributes = _attributes(node, {"approximate"})
        half = self._op("Mul", f"{name}/half", x, self._number("half", 0.5, x))
        if attributes.get("approximate", b"none") == b"tanh":
            cube = self._op("Mul", f"{name}/cube", self._op("Mul", f"{name}/square", x, x), x)
            small = self._op("Mul", f"{name}/small", cube, self._number("cubic", 0.044715, x))
            inner = self._op("Add", f"{name}/inner", x, small)
            factor = self._number("root_two_by_pi", math.sqrt(2 / math.pi), x)
            bent = self._op("Tanh", f"{name}/bent", self._op("Mul", f"{name}/angle", inner, factor))
        else:
            factor = self._number("root_half", math.sqrt(0.5), x)
            bent = self._op("Erf", f"{name}/bent", self._op("Mul", f"{name}/angle", x, factor))
        one = self._number("one", 1.0, x)
        self._op("Mul", name, half, self._op("Add", f"{name}/gate", bent, one))

    def _op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """One node and its output, both called `name`; one that is there is used again."""
        if name not in self._made:
            self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
            self._made.add(name)
        return name

    def _wide(self, value: str, like: str) -> str:
        """`value`, of the type of `like`, in float32."""
        if self._kind(like) == TensorProto.FLOAT:
            return value
        return self._op("Cast", f"{value}/float32", value, to=TensorProto.FLOAT)

    def _narrow(self, value: str, like: str) -> str:
        kind = self._kind(like)
        if kind == TensorProto.FLOAT:
            return value
        return self._op("Cast", f"{value}/narrow", value, to=kind)

    def _number(self, name: str, value: float, like: str) -> str:
        """A scalar in the type of `like`."""
        kind = self._kind(like)
        full = f"plain/{name}/{value!r}/{TensorProto.DataType.Name(kind).lower()}"
        if full not in self.constants:
            array = np.array(value, helper.tensor_dtype_to_np_dtype(kind))
            self.constants[full] = numpy_helper.from_array(array, full)
        return full

    def _integers(self, name: str, values: list[int]) -> str:
        full = f"plain/{name}/{','.join(map(str, values))}"
        self.constants.setdefault(full, numpy_helper.from_array(np.array(values, np.int64), full))
        return full

    def _kind(self, value: str) -> int:
        return self._types[value].elem_type

    def _sizes(self, value: str) -> list[int]:
        """Dimensions of a value; 0 where they are not known before a call."""
        return [dim.dim_value for dim in self._types[value].shape.dim]


def _tensor_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name: value.type.tensor_type for value in values}


def _attributes(node: onnx.NodeProto, known: set[str]) -> dict[str, Any]:
    """Attributes by name. Raises: ValueError for one that the plain form does not heed."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if strange := found.keys() - known:
        raise ValueError(f"{node.name} has {', '.join(sorted(strange))}, without a plain form")
    return found
