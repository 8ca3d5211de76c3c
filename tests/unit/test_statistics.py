"""S and G against autograd on the whole model, by groups of layers, and a 7B model's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from distill import factors as factors_module
from distill.artifact import UserError
from distill.data import TokenSet
from distill.factors import FactorStore, factor_model, factors_key, open_factors
from distill.lowrank import break_even_rank
from distill.plan import NEURON_WRITERS
from distill.statistics import (
    VOCABULARY_CHUNK,
    Moments,
    decoder_layers,
    gather_moments,
    layer_groups,
    moment_bytes,
    token_weights,
)
from distill.teacher import target_modules

Model = Callable[..., PreTrainedModel]
SEQUENCES, SEQ_LEN, BATCH, SEED, ANSWER_WEIGHT, LAYERS = 5, 30, 2, 7, 4.0, 3
GIB = 2**30


def tokens(vocabulary: int = 384, *, seq_len: int = SEQ_LEN) -> TokenSet:
    generator = np.random.default_rng(0)
    ids_NT = generator.integers(3, vocabulary, (SEQUENCES, seq_len)).astype(np.int32)
    return TokenSet(ids_NT, generator.random(ids_NT.shape) < 0.2)


def gather(model: PreTrainedModel, layers: range, data: TokenSet | None = None) -> dict:
    return gather_moments(
        model,
        data or tokens(),
        layers,
        batch_size=BATCH,
        seed=SEED,
        answer_weight=ANSWER_WEIGHT,
    )


def direct_moments(
    model: PreTrainedModel, data: TokenSet, weight: float = ANSWER_WEIGHT
) -> dict[str, Moments]:
    """The same sampled targets, but logits, log-likelihood and gradients of the whole model."""
    generator = torch.Generator().manual_seed(SEED)
    weights_NT = token_weights(data.answer_NT, weight)
    linears = target_modules(model)
    S = {n: torch.zeros(m.in_features, m.in_features).double() for n, m in linears.items()}
    G = {n: torch.zeros(m.out_features, m.out_features).double() for n, m in linears.items()}
    for start in range(0, SEQUENCES, BATCH):
        rows = slice(start, start + BATCH)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def record(name: str) -> Callable:
            def hook(module: object, args: tuple[Tensor], output: Tensor) -> None:
                inputs[name], outputs[name] = args[0], output  # noqa: B023

            return hook

        handles = [m.register_forward_hook(record(n)) for n, m in linears.items()]
        model.get_input_embeddings().requires_grad_(True)
        logits_BTV = model(input_ids=torch.from_numpy(data.ids_NT[rows]).long()).logits
        for handle in handles:
            handle.remove()
        p_NV = logits_BTV.detach().flatten(0, 1).softmax(-1)
        assert len(p_NV) <= VOCABULARY_CHUNK, "one draw, so that both sample the same targets"
        target_N1 = torch.multinomial(p_NV, 1, generator=generator)
        log_p_N = logits_BTV.flatten(0, 1).log_softmax(-1).gather(1, target_N1)[:, 0]
        loss = -(weights_NT[rows].flatten().sqrt() * log_p_N).sum()
        gradients = torch.autograd.grad(loss, [outputs[n] for n in linears])
        for name, gradient in zip(linears, gradients, strict=True):
            x, g = inputs[name].detach().flatten(0, 1).double(), gradient.flatten(0, 1).double()
            S[name] += x.T @ x
            G[name] += g.T @ g
    model.requires_grad_(False)
    count = data.ids_NT.size
    return {n: Moments(S[n] / count, G[n] / count) for n in linears}


def assert_same(actual: Mapping[str, Moments], expected: Mapping[str, Moments]) -> None:
    assert list(actual) == list(expected)
    for name, moments in actual.items():
        for mine, theirs in zip(
            (moments.input_II, moments.gradient_OO),
            (expected[name].input_II, expected[name].gradient_OO),
            strict=True,
        ):
            tolerance = 1e-4 * float(theirs.abs().max())
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-3, atol=tolerance)


def test_moments_equal_direct_autograd(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    actual = gather(model, range(LAYERS))
    assert_same(actual, direct_moments(model, tokens()))
    assert list(actual) == list(target_modules(model))


def test_the_comparison_notices_a_lost_weight_and_another_model(tiny_model: Model) -> None:
    model = tiny_model("llama")
    actual = gather(model, range(LAYERS))
    with pytest.raises(AssertionError):
        assert_same(actual, direct_moments(model, tokens(), weight=1.0))
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight.mul_(1.05)
    with pytest.raises(AssertionError):
        assert_same(actual, direct_moments(model, tokens()))


def test_layer_by_layer_gives_the_moments_of_one_pass(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    single: dict[str, Moments] = {}
    for layer in range(LAYERS):
        single |= gather(model, range(layer, layer + 1))
    assert_same(single, gather(model, range(LAYERS)))


def test_gathering_leaves_no_gradients_hooks_or_graph(tiny_model: Model) -> None:
    model = tiny_model("qwen3")
    assert any(p.requires_grad for p in model.parameters())
    gather(model, range(1, 2))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_counts_every_token(tiny_model: Model) -> None:
    counted: list[int] = []
    gather_moments(
        tiny_model("llama"), tokens(), range(0, 1),
        batch_size=BATCH, seed=0, answer_weight=1.0, advance=counted.append,
    )  # fmt: skip
    assert counted == [60, 60, 30]


def test_several_vocabulary_chunks_cover_every_row(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other chunks draw other targets, so gradients agree in size only."""
    model, data = tiny_model("llama"), tokens()
    whole = gather(model, range(LAYERS), data)
    monkeypatch.setattr("distill.statistics.VOCABULARY_CHUNK", 17)
    name = "model.layers.0.self_attn.q_proj"
    chunked = gather(model, range(LAYERS), data)
    torch.testing.assert_close(chunked[name].input_II, whole[name].input_II)
    ratio = chunked[name].gradient_OO.trace() / whole[name].gradient_OO.trace()
    assert 0.5 < float(ratio) < 2


def test_token_weights_have_mean_one() -> None:
    weights = token_weights(np.array([[True, False, False, False]]), 5.0)
    torch.testing.assert_close(weights, torch.tensor([[2.5, 0.5, 0.5, 0.5]]))


def store(
    model: PreTrainedModel, directory: Path, memory_bytes: int, form: str = "pair"
) -> FactorStore:
    return factor_model(
        model, tokens(), directory, form=form, memory_bytes=memory_bytes,
        micro_batch=BATCH, answer_weight=ANSWER_WEIGHT, seed=SEED,
    )  # fmt: skip


def assert_same_store(actual: FactorStore, expected: FactorStore) -> None:
    assert {m.name for m in actual.modules} == {m.name for m in expected.modules}
    energies = {m.name: m.energy_K for m in expected.modules}
    for module in actual.modules:
        assert len(module.energy_K) == len(energies[module.name])
        if not len(module.energy_K):
            continue
        np.testing.assert_allclose(
            module.energy_K, energies[module.name], rtol=1e-3, atol=1e-6 * energies[module.name][0]
        )
        rank = break_even_rank(module.out_features, module.in_features)
        mine, theirs = (s.load(module.name).truncated(rank) for s in (actual, expected))
        torch.testing.assert_close(mine[0] @ mine[1], theirs[0] @ theirs[1], rtol=0, atol=2e-3)
    assert actual.neurons.keys() == expected.neurons.keys()
    for block, energy_M in expected.neurons.items():
        np.testing.assert_allclose(actual.neurons[block], energy_M, rtol=1e-2)
        moments = [s.neuron_moment(block) for s in (actual, expected)]
        torch.testing.assert_close(moments[0], moments[1])
        assert torch.equal(actual.neuron_order(block), expected.neuron_order(block))


@pytest.mark.parametrize("form", ["narrow", "pair"])
def test_a_small_memory_cap_gives_the_factors_of_one_group(
    form: str, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[range] = []
    original = factors_module.gather_moments

    def counted(*args: object, **kwargs: object) -> dict[str, Moments]:
        passes.append(args[2])  # type: ignore[arg-type]
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(factors_module, "gather_moments", counted)
    model = tiny_model("llama")
    one = store(model, tmp_path / "one", GIB, form)
    many = store(model, tmp_path / "many", 1, form)
    assert passes == [range(0, 3), range(0, 1), range(1, 2), range(2, 3)]
    assert_same_store(many, one)
    assert {m.name for m in one.modules} == target_modules(model).keys()
    for other in {"narrow", "pair", "svd"} - {form}:
        with pytest.raises(AssertionError):
            assert_same_store(store(model, tmp_path / other, GIB, other), one)


def test_a_narrow_store_has_of_a_pair_store_what_a_plan_that_narrows_needs(
    tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    pair, narrow = (store(model, tmp_path / form, GIB, form) for form in ("pair", "narrow"))
    assert not pair.neurons
    assert narrow.neurons.keys() == {f"model.layers.{layer}.mlp" for layer in range(LAYERS)}
    for mine, theirs in zip(narrow.modules, pair.modules, strict=True):
        assert (mine.name, mine.dense_macs) == (theirs.name, theirs.dense_macs)
        if ".mlp." in mine.name:
            assert not len(mine.energy_K) and len(theirs.energy_K)
            with pytest.raises(SafetensorError):
                narrow.load(mine.name)
            continue
        np.testing.assert_array_equal(mine.energy_K, theirs.energy_K)
        mine_R, theirs_R = (s.load(mine.name).truncated(4) for s in (narrow, pair))
        assert all(map(torch.equal, mine_R, theirs_R))
        assert torch.equal(*(s.gradient_moment(mine.name) for s in (narrow, pair)))


def test_a_damaged_store_is_refused_and_the_key_follows_its_content(
    tiny_model: Model, tmp_path: Path
) -> None:
    store(tiny_model("llama"), tmp_path / "factors", GIB)
    open_factors(tmp_path / "factors")
    damaged = tmp_path / "factors" / "layer-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError, match="layer-1"):
        open_factors(tmp_path / "factors")
    keys = {
        factors_key("a", tokens(), "pair", 1.0), factors_key("b", tokens(), "pair", 1.0),
        factors_key("a", tokens(), "narrow", 1.0), factors_key("a", tokens(), "pair", 2.0),
        factors_key("a", tokens(383), "pair", 1.0),
    }  # fmt: skip
    assert len(keys) == 5


@pytest.fixture(scope="module")
def llama_7b() -> PreTrainedModel:
    """The shapes of Llama-7B without its weights."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_layer_groups_cover_every_layer_within_the_bound(llama_7b: PreTrainedModel) -> None:
    layers = decoder_layers(llama_7b)
    need = moment_bytes(layers[0])
    for bound in (1, need, 3 * need - 1, 3 * need, 5 * need, 100 * need):
        groups = layer_groups(layers, bound)
        assert [index for group in groups for index in group] == list(range(32))
        assert all(len(g) == 1 or len(g) * need <= bound for g in groups)
    assert [len(g) for g in layer_groups(layers, 3 * need - 1)] == [2] * 16
    assert layer_groups(layers, 100 * need) == [range(0, 32)]


@pytest.mark.parametrize(
    ("bytes_per_weight", "graph_bytes_per_token", "bound_gib"), [(2, 130_000, 28), (4, 228_000, 44)]
)
def test_a_7b_plan_fits_64_gib_of_host_memory(
    llama_7b: PreTrainedModel, bytes_per_weight: int, graph_bytes_per_token: int, bound_gib: int
) -> None:
    """The figures that the docstring of distill/factors.py quotes."""
    D, I, layers = 4096, 11008, decoder_layers(llama_7b)  # noqa: E741
    per_layer = moment_bytes(layers[0])
    assert per_layer == 4 * ((3 * D**2 + I**2) + (5 * D**2 + 2 * I**2))
    assert per_layer / 1e9 == pytest.approx(2.0, abs=0.02)
    groups = layer_groups(layers, 8 * GIB)
    assert {len(g) for g in groups} == {4}
    narrow = moment_bytes(layers[0], NEURON_WRITERS)
    assert narrow == 4 * ((2 * D**2 + I**2) + 5 * D**2)
    assert narrow / 1e9 == pytest.approx(0.95, abs=0.01)
    assert {len(g) for g in layer_groups(layers, 8 * GIB, NEURON_WRITERS)} == {8}
    moments = 4 * per_layer
    assert moments / 1e9 == pytest.approx(8.0, abs=0.05)
    model = bytes_per_weight * sum(p.numel() for p in llama_7b.parameters())
    assert model / 1e9 == pytest.approx(13.5 * bytes_per_weight / 2, abs=0.1)
    graph = 2 * 512 * len(layers) * graph_bytes_per_token
    square = 8 * max(D, I) ** 2
    float64_work = square + 10 * 8 * D**2 + 4 * 8 * D * I
    assert float64_work / 1e9 < 3.8
    ranks = {n: break_even_rank(*m.weight.shape) for n, m in target_modules(llama_7b).items()}
    layer_factors = 4 * sum(
        r * sum(llama_7b.get_submodule(n).weight.shape)
        for n, r in ranks.items()
        if ".layers.0." in n
    )
    assert 2 * layer_factors / 1e9 == pytest.approx(1.6, abs=0.05)
    peak = model + moments + max(graph, float64_work + 2 * layer_factors)
    assert peak <= bound_gib * GIB <= 64 * GIB
