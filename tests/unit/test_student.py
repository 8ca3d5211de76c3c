"""The student in training equals the dense original at d = g = 1, and its merge equals itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.factors import FactorStore
from distill.lowrank import Factors, break_even_rank, two_sided_svd
from distill.modeling_budgeted import FactoredLinear, RemovedLinear
from distill.plan import Action, Decision, Module, Plan
from distill.structure import build_learned, build_structure, densify
from distill.student import BudgetedLinear, budgeted_modules, lora_init, merge, structured_module
from distill.teacher import target_modules

Model = Callable[..., PreTrainedModel]
MIXED: dict[str, tuple[Action, int]] = {  # in the last layer; elsewhere v is approximated
    "q_proj": ("keep", 0), "k_proj": ("approximate", 8), "v_proj": ("remove", 0),
    "o_proj": ("approximate", 16), "gate_proj": ("keep", 0), "up_proj": ("approximate", 24),
    "down_proj": ("approximate", 8),
}  # fmt: skip
LORA_RANK = 4
IDS = torch.arange(3, 51)[None]


class MemoryStore:
    """A FactorStore of plain SVDs that needs no disk."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.linears = target_modules(model)
        self.factors = {
            n: two_sided_svd(m.weight.detach(), None, None) for n, m in self.linears.items()
        }
        self.modules = tuple(
            Module(n, m.out_features, m.in_features, self.factors[n].energy_K.numpy())
            for n, m in self.linears.items()
        )

    def load(self, name: str) -> Factors:
        return self.factors[name]


def store_of(model: PreTrainedModel) -> FactorStore:
    return cast(FactorStore, MemoryStore(model))


def plan_of(model: PreTrainedModel, actions: dict[str, tuple[Action, int]] | None) -> Plan:
    """``actions`` by leaf name; None approximates everything at full rank."""
    decisions = []
    for name, linear in target_modules(model).items():
        O, I = linear.out_features, linear.in_features  # noqa: E741
        chosen: tuple[Action, int] = ("approximate", min(O, I))
        action, rank = chosen if actions is None else actions[name.rpartition(".")[2]]
        if action == "remove" and ".layers.2." not in name:
            action, rank = "approximate", 8
        macs = O * I if action == "keep" else rank * (O + I)
        decisions.append(Decision(name, action, rank, macs, O, I, ""))
    return Plan(0.5, "budgeted", "spectral", 8, tuple(decisions))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit (of 1 where they are all smaller)."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


def built(
    model: PreTrainedModel, actions: dict[str, tuple[Action, int]] | None, *, anneal: bool
) -> Plan:
    plan = plan_of(model, actions)
    build_structure(model, plan, store_of(model), lora_rank=LORA_RANK, anneal=anneal)
    return plan


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)


def first(model: nn.Module, leaf: str) -> BudgetedLinear:
    return next(m for n, m in budgeted_modules(model).items() if n.endswith(leaf))


def test_full_retention_is_the_dense_original(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    dense = logits(model)
    built(model, MIXED, anneal=True)
    assert_same(logits(model), dense)
    first(model, "k_proj").retention.fill_(0.99)
    with pytest.raises(AssertionError):
        assert_same(logits(model), dense)


def test_learned_modules_start_as_the_dense_original(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    dense = logits(model)
    build_learned(model, store_of(model), prior=None)
    assert all(m.learned for m in budgeted_modules(model).values())
    assert_same(logits(model), dense)
    with torch.no_grad():
        first(model, "up_proj").gate_R[-1] = 0
    with pytest.raises(AssertionError):
        assert_same(logits(model), dense)


def test_full_rank_is_the_dense_original(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    dense = logits(model)
    plan = built(model, None, anneal=False)
    assert all(m.dense_OI is None for m in budgeted_modules(model).values())
    assert_same(logits(model), dense)
    merge(model, plan, torch.float32)
    assert_same(logits(model), dense)
    factored = next(m for m in model.modules() if isinstance(m, FactoredLinear))
    with torch.no_grad():
        factored.down.weight[-1] = 0
    with pytest.raises(AssertionError):
        assert_same(logits(model), dense)


def test_merged_equals_unmerged(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    plan = built(model, MIXED, anneal=False)
    shake(model)
    unmerged = logits(model)
    merge(model, plan, torch.float32)
    assert_same(logits(model), unmerged)
    kinds = {n: type(model.get_submodule(n)) for n in (d.module for d in plan.decisions)}
    wanted = {"keep": nn.Linear, "approximate": FactoredLinear, "remove": RemovedLinear}
    assert kinds == {d.module: wanted[d.action] for d in plan.decisions}
    assert not budgeted_modules(model)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
        weight = next(model.get_submodule(f"model.layers.1.{leaf}").parameters())
        correct = weight.detach().clone()
        with torch.no_grad():
            weight[0].mul_(1.5)
        with pytest.raises(AssertionError):
            assert_same(logits(model), unmerged)
        with torch.no_grad():
            weight.copy_(correct)
    assert_same(logits(model), unmerged)


def test_an_annealed_student_merges_to_the_one_that_was_cut(tiny_model: Model) -> None:
    annealed, cut = tiny_model("qwen2"), tiny_model("qwen2")
    plan = built(annealed, MIXED, anneal=True)
    built(cut, MIXED, anneal=False)
    with pytest.raises(AssertionError):
        assert_same(logits(annealed), logits(cut))
    for name, module in budgeted_modules(annealed).items():
        if not name.endswith(("q_proj", "gate_proj")):
            module.dense_OI = None
    assert_same(logits(annealed), logits(cut))
    assert_same(logits(merge(annealed, plan, torch.float32)), logits(cut))


def test_densify_keeps_learned_retention_and_gates(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    build_learned(model, store_of(model), prior=None)
    shake(model)
    with torch.no_grad():
        for module in budgeted_modules(model).values():
            module.retention.fill_(0.7)
            module.gate_R.copy_(torch.linspace(1, 0, len(module.gate_R)))
    before = logits(model)
    densify(model)
    assert all(type(m) is nn.Linear for m in target_modules(model).values())
    assert not any(p.requires_grad for p in model.parameters())
    assert_same(logits(model), before)
    with torch.no_grad():
        target_modules(model)["model.layers.0.mlp.down_proj"].weight[0].mul_(1.5)
    with pytest.raises(AssertionError):
        assert_same(logits(model), before)


@pytest.mark.parametrize("anneal", [False, True])
def test_a_removed_module_leaves_its_bias(anneal: bool, tiny_model: Model) -> None:
    """qwen2 has biases on q, k and v."""
    model = tiny_model("qwen2")
    name = "model.layers.2.self_attn.v_proj"
    bias = model.get_submodule(name).bias.detach().clone()
    assert bias.abs().min() > 0
    plan = built(model, MIXED, anneal=anneal)
    if anneal:
        for module in budgeted_modules(model).values():
            module.retention.fill_(0)
    x = torch.randn(2, 5, 64)
    before = model.get_submodule(name)(x)
    merge(model, plan, torch.float32)
    removed = model.get_submodule(name)
    assert isinstance(removed, RemovedLinear)
    expected = bias.expand(2, 5, -1)
    assert torch.equal(removed(x), expected) and torch.equal(before, expected)
    with torch.no_grad():
        removed.bias.zero_()
    assert not torch.equal(removed(x), expected)


def test_a_kept_module_is_its_weight_plus_lora() -> None:
    linear = nn.Linear(24, 16)
    decision = Decision("m", "keep", 16, 24 * 16, 16, 24, "")
    module = structured_module(linear, None, decision, lora_rank=LORA_RANK, anneal=False, seed=0)
    assert isinstance(module, BudgetedLinear)
    x = torch.randn(3, 24)
    torch.testing.assert_close(module(x), linear(x))
    assert [n for n, _ in module.named_parameters()] == ["up", "down"]
    with torch.no_grad():
        module.up.normal_()
    expected = x @ (linear.weight + module.up @ module.down).T + linear.bias
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.effective_weight(), linear.weight + module.up @ module.down)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(module(x), linear(x))
    module(x).square().sum().backward()
    assert module.down.grad is not None and module.down.grad.any()


def test_lora_starts_at_zero_with_bounded_random_down_and_repeats_by_seed() -> None:
    weight = torch.zeros(16, 100)
    up, down = lora_init(weight, 8, seed=5)
    assert up.shape == (16, 8) and down.shape == (8, 100) and not up.any()
    assert 0.05 < float(down.abs().max()) <= 0.1
    assert torch.equal(down, lora_init(weight, 8, seed=5)[1])
    assert not torch.equal(down, lora_init(weight, 8, seed=6)[1])
    assert lora_init(weight, 64, seed=0)[1].shape == (16, 100)


def test_only_factors_adapters_and_norms_train_in_float32(family: str, tiny_model: Model) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    built(model, MIXED, anneal=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    leaves = {n.rpartition(".")[2] for n in trained}
    assert leaves == {"up", "down", "weight"}
    assert all("norm" in n for n in trained if n.endswith(".weight"))
    norms = [n for n, _ in model.named_parameters() if "norm" in n]
    assert set(norms) <= set(trained)


def test_learned_students_train_retention_and_gates_too(tiny_model: Model) -> None:
    model = tiny_model("qwen3")
    build_learned(model, store_of(model), prior=None)
    model(input_ids=IDS).logits.square().mean().backward()
    for module in budgeted_modules(model).values():
        rank = break_even_rank(module.out_features, module.in_features)
        assert module.gate_R.shape == (rank,)
        for parameter in (module.up, module.down, module.retention, module.gate_R):
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        assert module.dense_OI is not None and not module.dense_OI.requires_grad


def test_a_prior_starts_at_one_half_where_its_plan_cuts(tiny_model: Model) -> None:
    model = tiny_model("llama")
    plan = plan_of(model, MIXED)
    build_learned(model, store_of(model), prior=plan)
    for decision in plan.decisions:
        module = model.get_submodule(decision.module)
        assert isinstance(module, BudgetedLinear)
        gates = module.gate_R.tolist()
        if decision.action == "keep":
            assert float(module.retention) == 1 and set(gates) == {1.0}
        else:
            cut = decision.rank
            assert float(module.retention) == 0.5
            assert set(gates[:cut]) <= {1.0} and set(gates[cut:]) <= {0.5}


def test_learned_retention_and_gates_are_clamped() -> None:
    module = BudgetedLinear(
        torch.zeros(4, 5), torch.zeros(4, 3), torch.zeros(3, 5), None, learned=True
    )
    with torch.no_grad():
        module.retention.fill_(1.5)
        module.gate_R.copy_(torch.tensor([-0.5, 0.25, 2.0]))
    module.clamp_()
    assert float(module.retention) == 1 and module.gate_R.tolist() == [0.0, 0.25, 1.0]


def test_merge_writes_the_dtype_that_is_asked_for(tiny_model: Model) -> None:
    model = tiny_model("mistral")
    plan = built(model, MIXED, anneal=False)
    merge(model, plan, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()
