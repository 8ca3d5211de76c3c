"""Which neurons stay, what those that go leave to them, and the students that are made of it."""

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

from distill import neurons as neurons_module
from distill.args import DistilArgs
from distill.artifact import UserError
from distill.data import plain
from distill.factors import FactorStore, factor_model, store_bytes
from distill.hardware import _trained_macs
from distill.lowrank import GRADIENT_DAMPING, INPUT_DAMPING, damped
from distill.modeling_budgeted import FactoredLinear, RemovedLinear
from distill.neurons import NeuronRanking, narrowed_reader, rank_neurons
from distill.opening import check_structure
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

M, O, SAMPLES = 12, 7, 60  # noqa: E741
NEURONS, LAYERS, LORA_RANK = 128, 3, 4
DEAD = (3, 17, 18, 40, 41, 64, 90, 127)
CASES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "llama with biases")
Problem = tuple[Tensor, Tensor, Tensor]


def problem(seed: int, h_NM: Tensor | None = None) -> Problem:
    """A weight, correlated activations' moment of ``h_NM`` and a gradient moment."""
    torch.manual_seed(seed)
    if h_NM is None:
        h_NM = activations(seed)
    g_NO = torch.randn(SAMPLES, O) @ torch.randn(O, O)
    return torch.randn(O, M), h_NM.T @ h_NM / len(h_NM), g_NO.T @ g_NO / SAMPLES


def activations(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(M, M, generator=generator) + 2 * torch.eye(M)
    return torch.randn(SAMPLES, M, generator=generator) @ mixed


def loss_of_keeping(kept: list[int], weight_OM: Tensor, moment: Tensor, gradient: Tensor) -> float:
    """½ tr(G W (C − C_J C_JJ⁻¹ C_Jᵀ) Wᵀ), term by term."""
    C, G = damped(moment, INPUT_DAMPING), damped(gradient, GRADIENT_DAMPING)
    W, C_J = weight_OM.double(), C[:, kept]
    lost = C - C_J @ torch.linalg.inv(C[kept][:, kept]) @ C_J.T
    return 0.5 * float((G @ W @ lost @ W.T).trace())


def greedy_order(*given: Tensor) -> list[int]:
    """The last to go first, by trying every neuron at every step."""
    left, gone = list(range(M)), []
    while left:
        going = min(left, key=lambda j: loss_of_keeping([n for n in left if n != j], *given))
        left.remove(going)
        gone.append(going)
    return gone[::-1]


def assert_greedy(ranking: NeuronRanking, given: Problem) -> None:
    assert ranking.order_M.tolist() == greedy_order(*given)


def assert_energies_add_up(ranking: NeuronRanking, given: Problem, step: int = 1) -> None:
    """At every width that is a multiple of ``step``; nothing is lost where all stay."""
    order = ranking.order_M.tolist()
    assert sorted(order) == list(range(M)) and ranking.energy_M.dtype == torch.float64
    for k in range(0, M + 1, step):
        loss = loss_of_keeping(order[:k], *given)
        assert float(ranking.energy_M[k:].sum()) == pytest.approx(2 * loss, rel=1e-6, abs=1e-8)
    assert float(ranking.energy_M.sum()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_the_exact_loss_and_energies_are_its_growth(seed: int) -> None:
    given = problem(seed)
    ranking = rank_neurons(*given)
    assert_greedy(ranking, given)
    assert_energies_add_up(ranking, given)


@pytest.mark.parametrize("blind", ["weight", "moment", "gradient"])
def test_a_ranking_that_does_not_see_one_of_the_three_is_noticed(blind: str) -> None:
    given = problem(0)
    seen = dict(zip(("weight", "moment", "gradient"), given, strict=True))
    seen[blind] = torch.ones(O, M) if blind == "weight" else torch.eye(len(seen[blind]))
    wrong = rank_neurons(*seen.values())
    for check in (assert_greedy, assert_energies_add_up):
        with pytest.raises(AssertionError):
            check(wrong, given)


def test_energies_of_another_order_are_noticed() -> None:
    given = problem(1)
    ranking = rank_neurons(*given)
    with pytest.raises(AssertionError):
        assert_energies_add_up(replace(ranking, order_M=ranking.order_M.flip(0)), given)


def test_several_that_go_in_one_round_share_their_exact_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(neurons_module, "ROUNDS", 4)
    given = problem(2)
    ranking = rank_neurons(*given)
    assert_energies_add_up(ranking, given, step=3)
    assert (ranking.energy_M.view(4, 3) == ranking.energy_M[::3, None]).all()
    with pytest.raises(AssertionError):
        assert_energies_add_up(ranking, given)


def test_a_duplicate_and_a_dead_neuron_go_first_and_cost_almost_nothing() -> None:
    h_NM = torch.randn(500, M)
    live_M = rank_neurons(*problem(3, h_NM)).energy_M
    h_NM[:, 5], h_NM[:, 7] = h_NM[:, 2], 0
    ranking = rank_neurons(*problem(3, h_NM))
    last, energy_M = set(ranking.order_M[-2:].tolist()), ranking.energy_M
    assert 7 in last and last & {2, 5} and last <= {2, 5, 7}
    assert float(energy_M[-2:].sum()) < 1e-2 * float(energy_M.median())
    assert float(live_M[-2:].sum()) > 0.1 * float(live_M.median())


def assert_least_squares(narrow_OK: Tensor, weight_OM: Tensor, h_NM: Tensor, kept: Tensor) -> None:
    """What no linear map of the neurons that stay is closer to: W h, on ``h_NM`` and on the samples
    whose moment is the damping."""
    moment = h_NM.T @ h_NM / len(h_NM)
    extra = (len(h_NM) * INPUT_DAMPING * moment.diagonal().mean()).sqrt() * torch.eye(M)
    samples = torch.cat([h_NM, extra]).double()
    best = torch.linalg.lstsq(samples[:, kept], samples @ weight_OM.double().T).solution.T
    torch.testing.assert_close(narrow_OK.double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, M - 1, M])
def test_the_columns_that_stay_are_the_least_squares_solution(count: int) -> None:
    h_NM, weight_OM = activations(4), torch.randn(O, M)
    kept = torch.randperm(M)[:count]
    moment = h_NM.T @ h_NM / SAMPLES
    narrow_OK = narrowed_reader(weight_OM, moment, kept)
    assert (narrow_OK.shape, narrow_OK.dtype) == ((O, count), torch.float32)
    assert_least_squares(narrow_OK, weight_OM, h_NM, kept)
    cut_OK = weight_OM[:, kept]
    if count == M:
        torch.testing.assert_close(narrow_OK, cut_OK, rtol=1e-5, atol=1e-5)
        cut_OK = cut_OK.roll(1, 1)
    with pytest.raises(AssertionError):
        assert_least_squares(cut_OK, weight_OM, h_NM, kept)


def test_the_ranking_promises_what_the_reader_then_loses() -> None:
    """The estimated loss is the error of the narrowed reader on its samples (but for damping)."""
    h_NM = activations(5)
    given = weight_OM, moment, gradient = problem(5, h_NM)
    ranking = rank_neurons(*given)
    half_OO = torch.linalg.cholesky(damped(gradient, GRADIENT_DAMPING)).float()
    for count in (4, 8):
        kept = ranking.order_M[:count]
        lost_NO = h_NM @ weight_OM.T - h_NM[:, kept] @ narrowed_reader(weight_OM, moment, kept).T
        error = float((lost_NO @ half_OO).square().sum() / SAMPLES)
        assert error == pytest.approx(float(ranking.energy_M[count:].sum()), rel=0.05)
        dropped_NO = h_NM @ weight_OM.T - h_NM[:, kept] @ weight_OM[:, kept].T
        assert float((dropped_NO @ half_OO).square().sum() / SAMPLES) > 1.1 * error


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
        model, plain(ids_NT), directory / "factors", whitening="two-sided", memory_bytes=2**30,
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
    student = built(model, plan, store)
    shake(student)
    merge(student, plan, torch.float32)
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
    student = built(model, plan, store)
    shake(student)
    merge(student, plan, torch.float32)
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


def test_only_a_store_with_gradients_ranks_neurons(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    ids_NT = np.random.default_rng(0).integers(3, 380, (2, 32)).astype(np.int32)
    store = factor_model(
        tiny_model("llama"), plain(ids_NT), tmp_path / "factors", whitening="input",
        memory_bytes=2**30, micro_batch=2, answer_weight=1.0, seed=0,
    )  # fmt: skip
    assert store.neurons == {}
    assert not any(isinstance(unit, Mlp) for unit in units_of(store.modules, store.neurons))


def test_the_disk_that_is_asked_for_is_what_a_store_takes(made: Made) -> None:
    model, store = made
    files = store.directory.glob("layer-*.safetensors")
    assert store_bytes(model) == pytest.approx(sum(p.stat().st_size for p in files), rel=0.1)


def test_a_multiple_that_only_neurons_reach_fits_narrowed_mlps() -> None:
    model, args = build_tiny_model("llama"), DistilArgs(rank_multiple=64)
    check_structure(args, model)
    for others in (replace(args, mlp="pair"), replace(args, method="svd")):
        with pytest.raises(UserError, match="--rank-multiple 64"):
            check_structure(others, model)
