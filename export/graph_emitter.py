"""Nodes and initializers of one ONNX graph, emitted one after another.

Shapes: D in_features, E out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from distill.artifact import UserError

Flavour = Literal["ort", "standard"]
Precision = Literal["fp32", "fp16", "bf16"]

OPSET = 23
MICROSOFT = "com.microsoft"
FLOATS: dict[str, tuple[ir.DataType, Any]] = {
    "fp32": (ir.DataType.FLOAT, np.float32),
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
}


class Tensors(Protocol):
    """Stored tensors by name, such as `export.weights.Weights`."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def array(self, name: str) -> np.ndarray: ...


class Emitter:
    """Appends to one graph. Initializers that the graph never uses are never registered."""

    def __init__(self, weights: Tensors, flavour: Flavour, precision: Precision) -> None:
        self.weights = weights
        self.flavour = flavour
        self.float_type, self.numpy_type = FLOATS[precision]
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="decoder")
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.val(name, dtype=dtype, shape=shape)
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Make `value`, of the graph's float type, an output."""
        value.name, value.shape = name, ir.Shape(shape)
        value.type = ir.TensorType(self.float_type)
        self.graph.outputs.append(value)

    def op(
        self, kind: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output; both are called `name`, which is unique in the graph."""
        return self.ops(kind, *inputs, outputs=[name], domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: Sequence[str],
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node; an output of empty name is one that the node leaves out."""
        if domain:
            self.graph.opset_imports[domain] = 1
        node = ir.node(
            kind,
            inputs,
            attributes,
            domain=domain,
            outputs=[ir.Value(name=output) for output in outputs],
            name=name or outputs[0],
        )
        self.graph.append(node)
        return node.outputs

    def constant(self, name: str, array: np.ndarray | Sequence[int]) -> ir.Value:
        """A small constant, shared by everybody who asks for the same name; ints are int64.

        Its initializer is called constant/`name`, apart from stored tensors and nodes' outputs.
        """
        full = f"constant/{name}"
        if full not in self._initializers:
            values = np.asarray(array, None if isinstance(array, np.ndarray) else np.int64)
            return self._register(ir.Tensor(values, name=full))
        return self._initializers[full]

    def number(self, name: str, value: float) -> ir.Value:
        """A scalar of the graph's float type."""
        return self.constant(name, np.array(value, self.numpy_type))

    def vector(self, name: str, *, dtype: Any = None, offset: float = 0.0) -> ir.Value:
        """A stored tensor as it is, plus `offset`, in `dtype` (None: the graph's float type)."""
        kind = self.numpy_type if dtype is None else dtype

        def shifted() -> np.ndarray:
            array = self.weights.array(name)
            return array.astype(np.float32) + np.float32(offset) if offset else array

        return self._lazy(name, self.weights.shape(name), kind, shifted)

    def matrix(self, names: Sequence[str]) -> ir.Value:
        """Stored [E, D] matrices as one [D, sum of E]; the initializer's name joins theirs by +."""
        shapes = [self.weights.shape(name) for name in names]
        shape = (shapes[0][1], sum(size[0] for size in shapes))

        def joined() -> np.ndarray:
            arrays = [self.weights.array(name) for name in names]
            return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).T

        return self._lazy("+".join(names), shape, self.numpy_type, joined)

    def register_default(self, value: ir.Value, array: np.ndarray) -> None:
        """Give a graph input a default that a caller may override."""
        value.const_value = ir.Tensor(array, name=value.name)
        self.graph.register_initializer(value)

    def _lazy(
        self, name: str, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]
    ) -> ir.Value:
        """An initializer whose values are read and converted when the model is saved."""
        if name in self._initializers:
            return self._initializers[name]
        kind = ir.DataType.from_numpy(np.dtype(dtype))

        def tensor() -> ir.Tensor:
            return ir.Tensor(np.ascontiguousarray(converted(read(), dtype, name)), kind)

        return self._register(ir.LazyTensor(tensor, kind, ir.Shape(shape), name=name))

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        assert tensor.name is not None
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        self._initializers[tensor.name] = value
        return value


def converted(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in `dtype`. Raises: UserError when a finite value does not fit float16."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype is np.float16 and not np.isfinite(result).all():
        raise UserError(
            f"{name} holds values beyond 65504, the largest of fp16, or none at all; allowed are "
            "finite weights; use --precision bf16 or fp32"
        )
    return result
