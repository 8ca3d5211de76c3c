"""A plan against the tensors that carry it out: which modules are computed, and which are dead.

A module is dead when what it computes cannot reach the logits: its own branch ends in a removed
module, or is multiplied by one that is always zero. D in_features, E out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from distill.artifact import UserError
from distill.plan import NEURON_READER, Decision, Plan
from export.graph_config import Architecture
from export.weights import Weights

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
REMEDY = "needs a student as `python -m distill` wrote it; distil it again"


@dataclass(frozen=True)
class Structure:
    """What is left of every module of a student."""

    decisions: Mapping[str, Decision]
    dead: frozenset[str]
    biases: Mapping[str, str]  # module -> name of its bias tensor, where it has one

    def is_live(self, module: str) -> bool:
        """Whether the module is computed by one matmul or two."""
        return self.decisions[module].action != "remove" and module not in self.dead


def read_structure(plan: Plan, weights: Weights, architecture: Architecture) -> Structure:
    """Check that the tensors are exactly those of the plan, and of the sizes of the config.

    Raises: UserError naming the first module whose tensors contradict its decision.
    """
    decisions = {decision.module: decision for decision in plan.decisions}
    modules = [name for layer in range(architecture.layers) for name in modules_of(layer)]
    if odd := sorted(set(modules) ^ set(decisions)):
        raise UserError(
            f"{weights.directory / 'plan.json'} and config.json disagree about {odd[0]}; {REMEDY}"
        )
    for decision in decisions.values():
        _require_tensors(decision, weights)
        _require_sizes(decision, architecture, weights)
    _require_equal_widths(decisions, architecture.layers, weights)
    _require_embedding(architecture, weights)
    biases = {name: bias for name in modules if (bias := bias_of(decisions[name])) in weights}
    dead = dead_modules(decisions, biases.__contains__)
    return Structure(decisions, dead, biases)


def modules_of(layer: int) -> list[str]:
    """Names of one layer's target modules, in the order of computation."""
    prefix = f"model.layers.{layer}"
    return [
        *(f"{prefix}.self_attn.{name}" for name in ATTENTION),
        *(f"{prefix}.mlp.{name}" for name in MLP),
    ]


def parts_of(decision: Decision) -> list[tuple[str, tuple[int, int]]]:
    """(tensor name less ".weight", [D, E] as the graph multiplies it) of each of its matmuls."""
    name, rank = decision.module, decision.rank
    wide, out = decision.in_features, decision.out_features
    if decision.action == "keep":
        return [(name, (wide, out))]
    if decision.action == "narrow":
        return [(name, (rank, out) if name.endswith(NEURON_READER) else (wide, rank))]
    if decision.action == "approximate":
        return [(f"{name}.down", (wide, rank)), (f"{name}.up", (rank, out))]
    return []


def bias_of(decision: Decision) -> str:
    """Name of the tensor that would hold the module's bias."""
    return f"{decision.module}{'.up' if decision.action == 'approximate' else ''}.bias"


def dead_modules(
    decisions: Mapping[str, Decision], has_bias: Callable[[str], bool]
) -> frozenset[str]:
    """Modules that the plan does not remove although nothing of them reaches the logits.

    `has_bias(module)` says whether a module has a bias: a removed one then gives that, not zero.
    """
    dead: set[str] = set()
    for output, inputs in _branches(decisions):
        zero = {
            name for name in inputs if decisions[name].action == "remove" and not has_bias(name)
        }
        factors = [name for name in inputs if not name.endswith(("q_proj", "k_proj"))]
        scores = [name for name in inputs if name not in factors]
        if decisions[output].action == "remove":
            dead.update(inputs)
        elif zero.intersection(factors):
            dead.update([*inputs, output])
        elif zero.intersection(scores):
            dead.update(scores)
    return frozenset(name for name in dead if decisions[name].action != "remove")


def _branches(decisions: Mapping[str, Decision]) -> Iterable[tuple[str, list[str]]]:
    """(module that ends a branch, modules before it) of every branch."""
    for name in decisions:
        block, _, child = name.rpartition(".")
        if child == "o_proj":
            yield name, [f"{block}.{other}" for other in ATTENTION[:-1]]
        elif child == "down_proj":
            yield name, [f"{block}.{other}" for other in MLP[:-1]]


def _require_equal_widths(decisions: Mapping[str, Decision], layers: int, weights: Weights) -> None:
    """Raise UserError unless the projections of each MLP have the same neurons left."""
    for layer in range(layers):
        members = [decisions[f"model.layers.{layer}.mlp.{name}"] for name in MLP]
        if len({d.rank if d.action == "narrow" else None for d in members}) > 1:
            found = ", ".join(f"{d.action} (rank {d.rank})" for d in members)
            raise UserError(
                f"{weights.directory}: plan.json says {found} of the three projections of "
                f"model.layers.{layer}.mlp; all or none are narrowed, to the same neurons; {REMEDY}"
            )


def _require_tensors(decision: Decision, weights: Weights) -> None:
    """Raise UserError unless the module's tensors are those of its decision and no others."""
    name, bias, parts = decision.module, bias_of(decision), parts_of(decision)
    wanted: dict[str, tuple[int, ...]] = {
        f"{part}.weight": (size[1], size[0]) for part, size in parts
    }
    if bias in weights:
        wanted[bias] = (parts[-1][1][1] if parts else decision.out_features,)
    found = {
        tensor: weights.shape(tensor)
        for tensor in (*(f"{name}{part}.weight" for part in ("", ".down", ".up")), bias)
        if tensor in weights
    }
    if found != wanted:
        raise UserError(
            f"{weights.directory}: plan.json says {decision.action} (rank {decision.rank}) of "
            f"{name}, but its tensors are {_listed(found)}, not {_listed(wanted)}; {REMEDY}"
        )


def _require_sizes(decision: Decision, a: Architecture, weights: Weights) -> None:
    """Raise UserError when the plan has another width than attention is built for."""
    if decision.action == "narrow" and not decision.module.endswith(MLP):
        raise UserError(
            f"{weights.directory}: plan.json narrows {decision.module}, which is in no MLP; "
            f"{REMEDY}"
        )
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    expected = {
        "q_proj": (a.hidden, queries),
        "k_proj": (a.hidden, keys),
        "v_proj": (a.hidden, keys),
        "o_proj": (queries, a.hidden),
        "gate_proj": (a.hidden, decision.out_features),
        "up_proj": (a.hidden, decision.out_features),
        "down_proj": (decision.in_features, a.hidden),
    }[decision.module.rpartition(".")[2]]
    found = decision.in_features, decision.out_features
    if found != expected:
        raise UserError(
            f"{weights.directory}: {decision.module} maps {found[0]} to {found[1]} features, "
            f"config.json asks for {expected[0]} to {expected[1]}; {REMEDY}"
        )


def _require_embedding(a: Architecture, weights: Weights) -> None:
    tables = ["model.embed_tokens.weight", *([] if a.tied_head else ["lm_head.weight"])]
    for name in tables:
        if weights.shape(name) != (a.vocabulary, a.hidden):
            raise UserError(
                f"{weights.directory}: {name} is {list(weights.shape(name))}, config.json asks for "
                f"{[a.vocabulary, a.hidden]}; {REMEDY}"
            )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"
