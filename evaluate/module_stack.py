"""A plan's target modules as a bare ONNX stack: matmuls with random weights and nothing else.

They are chained as in a decoder block: o reads q, gate and up read o, down reads their sum; k and v
are outputs. Factored modules that read the same input share their first matmul, as in the graphs
that export writes for ONNX Runtime. Time does not depend on the weights' values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from distill.plan import Decision

OPSET = 20
LAYER = re.compile(r"\blayers\.(\d+)\.(?:.*\.)?([^.]+)$")


def layer_of(module: str) -> tuple[int, str]:
    """ "model.layers.3.self_attn.q_proj" -> (3, "q_proj").

    Raises: ValueError when the module is in no layer.
    """
    match = LAYER.search(module)
    if match is None:
        raise ValueError(f"{module} is in no layer")
    return int(match[1]), match[2]


def stack_model(decisions: Sequence[Decision], seed: int = 0) -> ir.Model:
    """The bare stack. Inputs: `x` [T, D] and, for what no module computes, `filler_N` [T, N]."""
    return _Stack(seed).build(decisions)


def stack_inputs(session: Any, tokens: int) -> dict[str, np.ndarray]:
    """Random inputs of `tokens` rows for a session of such a stack."""
    generator = np.random.default_rng(0)
    return {
        value.name: generator.standard_normal((tokens, value.shape[1])).astype(np.float32)
        for value in session.get_inputs()
    }


class _Stack:
    """Builds one graph; values are chained by module name within each layer."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._inputs: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def build(self, decisions: Sequence[Decision]) -> ir.Model:
        layers: dict[int, dict[str, Decision]] = {}
        for decision in decisions:
            layer, name = layer_of(decision.module)
            layers.setdefault(layer, {})[name] = decision
        x: ir.Value | None = None
        for modules in layers.values():
            x = self._layer(modules, x)
        if x is not None:
            self._outputs.append(x)
        graph = ir.Graph(
            list(self._inputs.values()),
            self._outputs,
            nodes=self._nodes,
            initializers=self._weights,
            opset_imports={"": OPSET},
            name="modules",
        )
        return ir.Model(graph, ir_version=10)

    def _layer(self, modules: Mapping[str, Decision], x: ir.Value | None) -> ir.Value:
        """q → o → gate + up → down; whatever is removed hands on a graph input instead."""
        hidden = modules["q_proj"].in_features
        x = x if x is not None else self._input("x", hidden)
        q, *sides = self._modules([modules[name] for name in ("q_proj", "k_proj", "v_proj")], x)
        self._outputs += [side for side in sides if side is not None]
        o_in = q if q is not None else self._filler(modules["o_proj"].in_features)
        (after,) = self._modules([modules["o_proj"]], o_in)
        after = after if after is not None else self._filler(hidden)
        both = self._modules([modules["gate_proj"], modules["up_proj"]], after)
        kept = [value for value in both if value is not None]
        if len(kept) == 2:
            kept = [*self._node("Add", kept)]
        down_in = kept[0] if kept else self._filler(modules["down_proj"].in_features)
        (down,) = self._modules([modules["down_proj"]], down_in)
        return down if down is not None else self._filler(hidden)

    def _modules(self, decisions: Sequence[Decision], x: ir.Value) -> list[ir.Value | None]:
        """Outputs of modules that read x; None for a removed one."""
        factored = [d for d in decisions if d.action == "approximate"]
        low = dict(zip((d.module for d in factored), self._low(factored, x), strict=True))
        return [
            None if d.action == "remove"
            else self._matmul(low[d.module], d.rank, d.out_features) if d.module in low
            else self._matmul(x, d.in_features, d.out_features)
            for d in decisions
        ]  # fmt: skip

    def _low(self, factored: Sequence[Decision], x: ir.Value) -> Sequence[ir.Value]:
        """The narrow values of factored modules, from one matmul."""
        if not factored:
            return []
        ranks = [d.rank for d in factored]
        joined = self._matmul(x, factored[0].in_features, sum(ranks))
        if len(ranks) == 1:
            return [joined]
        sizes = self._weight(np.array(ranks, dtype=np.int64))
        return self._node("Split", [joined, sizes], len(ranks), axis=-1)

    def _matmul(self, x: ir.Value, rows: int, columns: int) -> ir.Value:
        values = self._generator.random((rows, columns), dtype=np.float32) - np.float32(0.5)
        values *= math.sqrt(12 / rows)
        return self._node("MatMul", [x, self._weight(values)])[0]

    def _weight(self, values: np.ndarray) -> ir.Value:
        name = f"w{len(self._weights)}"
        weight = ir.Value(name=name, const_value=ir.Tensor(values, name=name))
        self._weights.append(weight)
        return weight

    def _node(
        self, kind: str, inputs: Sequence[ir.Value], count: int = 1, **attributes: int
    ) -> Sequence[ir.Value]:
        number = len(self._nodes)
        node = ir.node(kind, inputs, attributes, num_outputs=count, name=f"n{number}")
        for index, output in enumerate(node.outputs):
            output.name = f"v{number}_{index}"
            output.type = ir.TensorType(ir.DataType.FLOAT)
        self._nodes.append(node)
        return node.outputs

    def _filler(self, width: int) -> ir.Value:
        return self._input(f"filler_{width}", width)

    def _input(self, name: str, width: int) -> ir.Value:
        if name not in self._inputs:
            shape = ir.Shape(["tokens", width])
            self._inputs[name] = ir.Value(
                name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT)
            )
        return self._inputs[name]
