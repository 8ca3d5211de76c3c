"""Postconditions of lowering: what the finished graph computes is what the plan says, and no more.

Shapes: D in_features, E out_features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from distill.plan import Decision, Plan
from export.graph_structure import dead_modules, parts_of

FORBIDDEN = ("Identity", "If", "Loop", "Scan", "Dropout")
HEAD = "lm_head"


@dataclass(frozen=True)
class LoweredCounts:
    """What one token costs in the finished graph, and what became of every target module.

    `dense` (narrowed ones too), `factored`, `removed` and `dead` count modules and add up to the
    plan's; nothing of a dead one reaches the logits, although the plan does not remove it.
    `matmuls` counts the nodes that compute them. `macs` are those of the target modules, per token.
    """

    dense: int
    factored: int
    removed: int
    dead: int
    matmuls: int
    macs: int
    nodes: int
    weight_bytes: int

    def to_json(self) -> dict[str, int]:
        """For a manifest's measured figures."""
        return {
            "dense_matmuls": self.dense,
            "factored_matmuls": self.factored,
            "removed": self.removed,
            "dead": self.dead,
            "matmul_nodes": self.matmuls,
            "macs_per_token": self.macs,
            "nodes": self.nodes,
            "weight_bytes": self.weight_bytes,
        }


def check_lowered(model: ir.Model, plan: Plan) -> LoweredCounts:
    """Check the graph against the plan.

    Raises: ValueError naming the first node, initializer or module that contradicts it.
    """
    graph = model.graph
    _require_clean(graph)
    found = _matmul_shapes(graph)
    decisions = {decision.module: decision for decision in plan.decisions}
    dead = dead_modules(decisions, lambda module: f"{module}.bias" in graph.initializers)
    wanted = {
        path: shape
        for module, decision in decisions.items()
        if module not in dead
        for path, shape in parts_of(decision)
    }
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"{path}: the graph multiplies by {found.get(path)}, the plan says "
                f"{wanted.get(path)} [in, out]"
            )
    return _counts(graph, decisions, dead, found)


def _counts(
    graph: ir.Graph,
    decisions: Mapping[str, Decision],
    dead: frozenset[str],
    found: Mapping[str, tuple[int, int]],
) -> LoweredCounts:
    live = [d.action for name, d in decisions.items() if name not in dead]
    matmuls = [node for node in graph if node.op_type == "MatMul" and node.name != HEAD]
    return LoweredCounts(
        dense=live.count("keep") + live.count("narrow"),
        factored=live.count("approximate"),
        removed=live.count("remove"),
        dead=len(dead),
        matmuls=len(matmuls),
        macs=sum(math.prod(shape) for shape in found.values()),
        nodes=len(graph),
        weight_bytes=sum(
            value.const_value.nbytes
            for value in graph.initializers.values()
            if value.const_value is not None
        ),
    )


def _require_clean(graph: ir.Graph) -> None:
    """No control flow, nothing that does nothing, nothing unused, nothing of a lost domain."""
    outputs = set(graph.outputs)
    names: set[str | None] = set()
    values = {value.name for value in [*graph.inputs, *graph.initializers.values()]}
    for node in graph:
        if node.op_type in FORBIDDEN:
            raise ValueError(f"{node.name} is a forbidden {node.op_type}")
        if "lora" in f"{node.name}".lower():
            raise ValueError(f"{node.name} is an adapter")
        if not any(value.uses() or value in outputs for value in node.outputs):
            raise ValueError(f"{node.name}: nobody reads what it computes")
        if node.name in names:
            raise ValueError(f"{node.name} is the name of two nodes")
        names.add(node.name)
        for value in node.outputs:
            if value.name and value.name in values:
                raise ValueError(f"{value.name} is the name of two values")
            values.add(value.name)
    for value in graph.initializers.values():
        if not value.uses():
            raise ValueError(f"the initializer {value.name} is not used")
    used = {node.domain for node in graph}
    if used != set(graph.opset_imports):
        raise ValueError(f"opset imports {set(graph.opset_imports)}, but nodes are of {used}")


def _matmul_shapes(graph: ir.Graph) -> dict[str, tuple[int, int]]:
    """Path of every target module's matrix -> [D, E], those of a shared matmul apart."""
    found: dict[str, tuple[int, int]] = {}
    for node in graph:
        if node.op_type != "MatMul" or node.name == HEAD:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or weight.shape is None:
            raise ValueError(f"{node.name} multiplies by no constant")
        depth, width = (int(size) for size in weight.shape.numpy())
        paths = f"{node.name}".split("+")
        widths = [width] if len(paths) == 1 else _split_widths(node)
        if len(widths) != len(paths) or sum(widths) != width:
            raise ValueError(f"{node.name} makes {width} columns, split into {widths}")
        for path, part in zip(paths, widths, strict=True):
            if path in found:
                raise ValueError(f"{path} is multiplied twice")
            found[path] = (depth, part)
    return found


def _split_widths(matmul: ir.Node) -> list[int]:
    """Widths of the Split that follows a shared matmul."""
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Split":
        raise ValueError(f"{matmul.name} is shared, but no Split follows it alone")
    sizes = uses[0].node.inputs[1]
    if sizes is None or sizes.const_value is None:
        raise ValueError(f"{matmul.name} is followed by a Split of unknown widths")
    return [int(size) for size in sizes.const_value.numpy()]
