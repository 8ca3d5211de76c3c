"""A plan's target modules as a bare ONNX stack: matmuls with random weights and nothing else.

They are chained as in a decoder block: o reads q, gate and up read o, down reads their sum; k and v
are outputs. The nodes are those that export writes for ONNX Runtime, shared first matmuls included.
Time does not depend on the weights' values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from distill.plan import Decision
from export.graph_emitter import Emitter
from export.graph_linear import Matmuls
from export.graph_structure import Structure, parts_of

IR_VERSION = 10
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
    return _Stack(decisions, seed).build(decisions)


def stack_inputs(session: Any, tokens: int) -> dict[str, np.ndarray]:
    """Random inputs of `tokens` rows for a session of such a stack."""
    generator = np.random.default_rng(0)
    return {
        value.name: generator.standard_normal((tokens, value.shape[1])).astype(np.float32)
        for value in session.get_inputs()
    }


class _RandomWeights:
    """Uniform matrices of a plan's sizes, such that outputs are about as large as inputs."""

    def __init__(self, decisions: Sequence[Decision], seed: int) -> None:
        parts = [part for decision in decisions for part in parts_of(decision)]
        self._shapes = {f"{name}.weight": (out, wide) for name, (wide, out) in parts}
        self._generator = np.random.default_rng(seed)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def array(self, name: str) -> np.ndarray:
        values_ED = self._generator.random(self._shapes[name], dtype=np.float32) - np.float32(0.5)
        values_ED *= math.sqrt(12 / values_ED.shape[1])
        return values_ED


class _Stack:
    """Builds one graph; values are chained by module name within each layer."""

    def __init__(self, decisions: Sequence[Decision], seed: int) -> None:
        structure = Structure({d.module: d for d in decisions}, frozenset(), {})
        self._emitter = Emitter(_RandomWeights(decisions, seed), "ort", "fp32")
        self._matmuls = Matmuls(self._emitter, structure, share_inputs=True)
        self._graph = self._emitter.graph
        self._inputs: dict[str, ir.Value] = {}

    def build(self, decisions: Sequence[Decision]) -> ir.Model:
        layers: dict[int, dict[str, Decision]] = {}
        for decision in decisions:
            layer, name = layer_of(decision.module)
            layers.setdefault(layer, {})[name] = decision
        x: ir.Value | None = None
        for modules in layers.values():
            x = self._layer(modules, x)
        if x is not None:
            self._graph.outputs.append(x)
        for output in self._graph.outputs:
            output.type = ir.TensorType(self._emitter.float_type)
        return ir.Model(self._graph, ir_version=IR_VERSION)

    def _layer(self, modules: Mapping[str, Decision], x: ir.Value | None) -> ir.Value:
        """q → o → gate + up → down; whatever is removed hands on a graph input instead."""
        hidden = modules["q_proj"].in_features
        x = x if x is not None else self._input("x", hidden)
        q, *sides = self._modules([modules[name] for name in ("q_proj", "k_proj", "v_proj")], x)
        self._graph.outputs.extend(side for side in sides if side is not None)
        o_in = q if q is not None else self._filler(modules["o_proj"].in_features)
        (after,) = self._modules([modules["o_proj"]], o_in)
        after = after if after is not None else self._filler(hidden)
        both = self._modules([modules["gate_proj"], modules["up_proj"]], after)
        kept = [value for value in both if value is not None]
        if len(kept) == 2:
            name = modules["up_proj"].module
            kept = [self._emitter.op("Add", *kept, name=f"{name}/plus_gate")]
        down_in = kept[0] if kept else self._filler(modules["down_proj"].in_features)
        (down,) = self._modules([modules["down_proj"]], down_in)
        return down if down is not None else self._filler(hidden)

    def _modules(self, decisions: Sequence[Decision], x: ir.Value) -> list[ir.Value | None]:
        """Outputs of modules that read x; None for a removed one."""
        made = self._matmuls.live(x, [d.module for d in decisions])
        return [made.get(d.module) for d in decisions]

    def _filler(self, width: int) -> ir.Value:
        return self._input(f"filler_{width}", width)

    def _input(self, name: str, width: int) -> ir.Value:
        if name not in self._inputs:
            kind = self._emitter.float_type
            self._inputs[name] = self._emitter.input(name, kind, ["tokens", width])
        return self._inputs[name]
