"""Students with narrowed MLPs: built, merged, saved, counted and told apart."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.args import DistilArgs
from distill.artifact import UserError
from distill.data import plain
from distill.factors import FactorStore, factor_model, store_bytes
from distill.hardware import _trained_macs
from distill.modeling_budgeted import FactoredLinear, RemovedLinear
from distill.opening import check_structure
from distill.pipeline import plan_fingerprint
from distill.plan import Mlp, Option, Plan, Unit, units_of
from distill.structure import build_structure
from distill.student import budgeted_modules, merge
from distill.student_format import (
    count_macs,
    dense_state,
    load_student,
    save_dense_copy,
    save_student,
)
from tests.conftest import build_tiny_model
from tests.unit.test_student import assert_same, logits, shake

NEURONS, LAYERS, LORA_RANK = 128, 3, 4
DEAD = (3, 17, 18, 40, 41, 64, 90, 127)
CASES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "llama with biases")
Made = tuple[PreTrainedModel, FactorStore]


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model each of whose MLPs has eight dead neurons, and its store."""
    family, _, biases = request.param.partition(" with ")
    return with_dead_neurons(
        build_tiny_model(family, **({"mlp_bias": True} if biases else {})),
        tmp_path_factory.mktemp("store"),
    )


@pytest.fixture(scope="module")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return with_dead_neurons(build_tiny_model("llama"), tmp_path_factory.mktemp("store"))


def with_dead_neurons(model: PreTrainedModel, directory: Path) -> Made:
    for layer in model.model.layers:
        with torch.no_grad():
            for parameter in layer.mlp.gate_proj.parameters():
                parameter[list(DEAD)] = 0
    ids_NT = np.random.default_rng(0).integers(3, 380, (8, 64)).astype(np.int32)
    store = factor_model(
        model, plain(ids_NT), directory / "factors", form="narrow", memory_bytes=2**30,
        micro_batch=4, answer_weight=1.0, seed=0,
    )  # fmt: skip
    return model, store


def plan_of(store: FactorStore, choose: Callable[[Unit], Option]) -> Plan:
    units = units_of(store.modules, store.neurons)
    decisions = tuple(d for unit in units for d in choose(unit).decisions)
    return Plan(0.5, "budgeted", "spectral", 8, decisions)


def narrow_alone(store: FactorStore, width: int) -> Plan:
    """Every MLP narrowed to ``width``, all else kept."""

    def choose(unit: Unit) -> Option:
        if not isinstance(unit, Mlp):
            return unit.options(8)[-1]
        return unit.options(width)[1]

    return plan_of(store, choose)


def mixed(store: FactorStore) -> Plan:
    """MLPs narrowed, kept and removed; attention in pairs of rank 8."""
    which = {"model.layers.0.mlp": 5, "model.layers.1.mlp": -1, "model.layers.2.mlp": 0}

    def choose(unit: Unit) -> Option:
        if not isinstance(unit, Mlp):
            return unit.options(8)[1]
        return unit.options(8)[which[unit.modules[0].name.rpartition(".")[0]]]

    return plan_of(store, choose)


def built(model: PreTrainedModel, plan: Plan, store: FactorStore) -> PreTrainedModel:
    student = copy.deepcopy(model)
    build_structure(student, plan, store, lora_rank=LORA_RANK, anneal=False)
    return student


def merged(model: PreTrainedModel, plan: Plan, store: FactorStore) -> PreTrainedModel:
    """As after a training that moved every parameter."""
    student = built(model, plan, store)
    shake(student)
    return merge(student, plan, torch.float32)


def test_the_store_knows_the_dead_neurons(made: Made) -> None:
    _, store = made
    assert len(store.neurons) == LAYERS
    for block, energy_M in store.neurons.items():
        order_M, moment_MM = store.neuron_order(block), store.neuron_moment(block)
        assert sorted(order_M.tolist()) == list(range(NEURONS))
        assert set(order_M[-len(DEAD) :].tolist()) == set(DEAD)
        assert not moment_MM[list(DEAD)].any()
        assert energy_M.shape == (NEURONS,) and (energy_M >= 0).all()
        assert energy_M[-len(DEAD) :].sum() < 1e-2 * energy_M[: -len(DEAD)].sum()


def test_without_its_dead_neurons_an_mlp_is_the_dense_original(made: Made) -> None:
    model, store = made
    dense, alive = logits(model), NEURONS - len(DEAD)
    student = built(model, narrow_alone(store, alive), store)
    for name, module in budgeted_modules(student).items():
        narrow = (module.out_features, module.in_features)[name.endswith("down_proj")]
        assert narrow == alive or ".mlp." not in name
    assert_same(logits(student), dense)
    with pytest.raises(AssertionError):
        assert_same(logits(built(model, narrow_alone(store, alive - 1), store)), dense)


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
def test_projections_that_disagree_on_their_neurons_are_noticed(
    leaf: str, made_llama: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = made_llama
    dense, plan = logits(model), narrow_alone(store, NEURONS - len(DEAD))
    order, calls = FactorStore.neuron_order, itertools.count()

    def disagreeing(self: FactorStore, block: str) -> Tensor:
        at = ("gate_proj", "up_proj", "down_proj").index(leaf)
        order_M = order(self, block)
        if next(calls) == at:
            order_M[[0, 1]] = order_M[[1, 0]]
        return order_M

    monkeypatch.setattr(FactorStore, "neuron_order", disagreeing)
    student = built(model, plan, store)
    with pytest.raises(AssertionError):
        assert_same(logits(student), dense)


def test_a_narrow_student_merges_to_itself(made: Made) -> None:
    model, store = made
    plan = mixed(store)
    student = built(model, plan, store)
    shake(student)
    unmerged = logits(student)
    with pytest.raises(AssertionError):
        assert_same(unmerged, logits(model))
    merge(student, plan, torch.float32)
    assert_same(logits(student), unmerged)
    assert not budgeted_modules(student)
    wanted = {"approximate": FactoredLinear, "remove": RemovedLinear}
    for decision in plan.decisions:
        kind = wanted.get(decision.action, nn.Linear)
        assert type(student.get_submodule(decision.module)) is kind
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        weight = student.get_submodule(f"model.layers.0.mlp.{leaf}").weight
        correct = weight.detach().clone()
        with torch.no_grad():
            weight[0].mul_(1.5)
        with pytest.raises(AssertionError):
            assert_same(logits(student), unmerged)
        with torch.no_grad():
            weight.copy_(correct)


def test_a_narrow_student_is_saved_counted_and_loaded(
    made: Made, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, store = made
    plan = mixed(store)
    student = merged(model, plan, store)
    assert plan.widths == {"model.layers.0.mlp": 40}
    save_student(tmp_path / "student", student, tiny_tokenizer, plan.ranks, plan.widths)
    assert count_macs(tmp_path / "student").target == plan.macs
    loaded = load_student(tmp_path / "student")
    assert loaded.model.layers[0].mlp.down_proj.in_features == 40
    assert torch.equal(logits(loaded), logits(student))
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert not torch.equal(logits(loaded), logits(student))


def test_a_dense_copy_is_the_narrow_student_with_neurons_of_zero(
    made: Made, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, store = made
    plan = mixed(store)
    student = merged(model, plan, store)
    state, narrow = dense_state(student), logits(student)
    up = "model.layers.0.mlp.up_proj.weight"
    assert state.keys() - model.state_dict().keys() == set()
    assert state[up].shape == (NEURONS, 64) and not state[up][40:].any()
    plain_model = copy.deepcopy(model)
    plain_model.load_state_dict(state)
    assert_same(logits(plain_model), narrow)
    plain_model.load_state_dict(state | {up: state[up].roll(1, 0)})
    with pytest.raises(AssertionError):
        assert_same(logits(plain_model), narrow)
    save_dense_copy(tmp_path / "dense", student, tiny_tokenizer)
    copied = load_student(tmp_path / "dense")
    assert type(copied) is type(model) and count_macs(tmp_path / "dense").target == plan.dense_macs
    assert_same(logits(copied), narrow)


def test_what_trains_in_a_narrow_module_is_what_its_flops_count(made_llama: Made) -> None:
    model, store = made_llama
    plan = mixed(store)
    for name, module in budgeted_modules(built(model, plan, store)).items():
        decision = next(d for d in plan.decisions if d.module == name)
        trained = module.up.numel() + module.down.numel()
        assert _trained_macs(decision, LORA_RANK) == trained
        if decision.action == "narrow":
            assert module.dense_OI is not None and module.dense_OI.numel() == decision.macs
            assert not module.dense_OI.requires_grad and not module.up.any()


@pytest.mark.parametrize("form", ["narrow", "pair", "svd"])
def test_the_disk_that_is_asked_for_is_what_a_store_takes(
    form: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    ids_NT = np.random.default_rng(0).integers(3, 380, (2, 32)).astype(np.int32)
    model = tiny_model("llama")
    store = factor_model(
        model, plain(ids_NT), tmp_path / "factors", form=form,
        memory_bytes=2**30, micro_batch=2, answer_weight=1.0, seed=0,
    )  # fmt: skip
    narrows = [isinstance(unit, Mlp) for unit in units_of(store.modules, store.neurons)]
    assert any(narrows) == (form == "narrow")
    files = store.directory.glob("layer-*.safetensors")
    assert store_bytes(model, form) == pytest.approx(sum(p.stat().st_size for p in files), rel=0.1)


def test_a_fingerprint_tells_plans_and_the_neurons_that_stay(
    made_llama: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not mind in which order the others went, nor what a reason says."""
    _, store = made_llama
    plan, order = mixed(store), FactorStore.neuron_order
    first = plan_fingerprint(plan, store)
    again = tuple(replace(d, reason="another") for d in plan.decisions)
    assert plan_fingerprint(replace(plan, decisions=again), store) == first
    assert plan_fingerprint(narrow_alone(store, 40), store) != first
    for swapped, same in (([0, 1], False), ([39, 40], False), ([40, 41], True)):

        def other(self: FactorStore, block: str, at: list[int] = swapped) -> Tensor:
            order_M = order(self, block)
            order_M[at] = order_M[at[::-1]]
            return order_M

        monkeypatch.setattr(FactorStore, "neuron_order", other)
        assert (plan_fingerprint(plan, store) == first) == same


def test_a_multiple_that_only_neurons_reach_fits_narrowed_mlps() -> None:
    model, args = build_tiny_model("llama"), DistilArgs(rank_multiple=64)
    check_structure(args, model)
    for others in (replace(args, mlp="pair"), replace(args, method="svd")):
        with pytest.raises(UserError, match="--rank-multiple 64"):
            check_structure(others, model)
