"""A lowered graph computes what the PyTorch student computes, in both flavours.

Every comparison goes through `assert_same`; the twins break one thing in a graph and must be caught
by that same function at the same tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.lower import lower, save_onnx
from tests.parity.lower_cases import (
    MIXES,
    Cases,
    Lowered,
    lowered,
    torch_logits,
)

FP32 = 1e-4
FP16 = 2e-2
BF16 = 8e-2
FLAVOURS = ("ort", "standard")
LENGTH = 40  # above the sliding windows of 24
PIECES = (12, 20, 1, 1, 6)


def assert_same(
    expected: np.ndarray, got: np.ndarray, limit: float, where: np.ndarray | None = None
) -> None:
    """Raise AssertionError unless the largest difference is at most `limit` × largest logit.

    `where` [B, S] selects the positions that count; the others must be finite all the same.
    """
    assert expected.shape == got.shape
    assert np.isfinite(got).all()
    if where is not None:
        expected, got = expected[where], got[where]
    error, allowed = np.abs(expected - got).max(), limit * np.abs(expected).max()
    assert error <= allowed, f"logits differ by {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture
def ids_BS() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 384, (2, LENGTH))


@pytest.fixture
def padded_BS() -> np.ndarray:
    """A mask: nine columns of left padding and a hole in the first row, none in the second."""
    mask_BS = np.ones((2, LENGTH), np.int64)
    mask_BS[0, :9] = 0
    mask_BS[0, 20:22] = 0
    return mask_BS


Make = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def student(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Make:
    return Cases(tmp_path_factory, tiny_tokenizer)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_family_and_mix(
    family: str,
    mix: str,
    flavour: str,
    student: Make,
    ids_BS: np.ndarray,
    padded_BS: np.ndarray,
    tmp_path: Path,
) -> None:
    """Prefill, pieces with a cache, one row padded: every position equals PyTorch's."""
    model, directory = student(family, mix)
    graph = lowered(directory, tmp_path, flavour, share_inputs=flavour == "ort")  # type: ignore[arg-type]
    expected = torch_logits(model, ids_BS)
    assert_same(expected, graph.step(ids_BS)[0], FP32)
    assert_same(expected, graph.in_steps(ids_BS, None, PIECES), FP32)
    padded = torch_logits(model, ids_BS, padded_BS)
    assert_same(padded, graph.in_steps(ids_BS, padded_BS, [LENGTH]), FP32, padded_BS == 1)
    assert_same(padded, graph.in_steps(ids_BS, padded_BS, PIECES), FP32, padded_BS == 1)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "mix", ["factored", "narrow", "outputs removed", "inputs removed", "values removed"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_biases(
    family: str, mix: str, flavour: str, student: Make, ids_BS: np.ndarray, tmp_path: Path
) -> None:
    """A removed module with a bias gives that bias, everywhere; a narrow one has fewer biases."""
    model, directory = student(family, mix, biased=True)
    graph = lowered(directory, tmp_path, flavour, share_inputs=True)  # type: ignore[arg-type]
    assert_same(torch_logits(model, ids_BS), graph.in_steps(ids_BS, None, PIECES), FP32)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("llama", {"tie_word_embeddings": False, "rope_theta": 1e6, "head_dim": 24}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 1, "vocab_size": 401}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("gemma3_text", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 40}),
        ("gemma3_text", {"tie_word_embeddings": False, "hidden_activation": "gelu"}),
    ],
    ids=str,
)
def test_details_of_families(
    family: str,
    overrides: dict[str, object],
    flavour: str,
    student: Make,
    ids_BS: np.ndarray,
    tmp_path: Path,
) -> None:
    model, directory = student(family, "factored", **overrides)
    graph = lowered(directory, tmp_path, flavour)  # type: ignore[arg-type]
    assert_same(torch_logits(model, ids_BS), graph.in_steps(ids_BS, None, PIECES), FP32)


@pytest.fixture(scope="module")
def graphs(
    student: Make, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[PreTrainedModel, Lowered]]:
    """`graphs("llama", "ort")`: a factored student and its graph, made once."""
    made: dict[tuple[str, str], Lowered] = {}

    def make(family: str, flavour: str) -> tuple[PreTrainedModel, Lowered]:
        model, directory = student(family, "factored")
        if (family, flavour) not in made:
            folder = tmp_path_factory.mktemp("graph")
            made[family, flavour] = lowered(directory, folder, flavour)  # type: ignore[arg-type]
        return model, made[family, flavour]

    return make


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("keep", [1, 3, LENGTH, LENGTH + 5])
def test_logits_of_the_positions_asked_for(
    keep: int, flavour: str, family: str, graphs: Callable[..., tuple], ids_BS: np.ndarray
) -> None:
    model, graph = graphs(family, flavour)
    expected = torch_logits(model, ids_BS)[:, -keep:]
    assert_same(expected, graph.step(ids_BS, keep=keep)[0], FP32)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("pieces", [(1, 1, 1), (1, LENGTH - 1), (LENGTH - 1, 1), (0, 4)])
def test_shortest_pasts_and_pieces(
    pieces: tuple[int, ...],
    flavour: str,
    family: str,
    graphs: Callable[..., tuple],
    ids_BS: np.ndarray,
) -> None:
    model, graph = graphs(family, flavour)
    ids_BS = ids_BS[:, : sum(pieces)]
    got = graph.in_steps(ids_BS, None, [length for length in pieces if length])
    assert_same(torch_logits(model, ids_BS), got, FP32)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_masked_row_stays_finite_and_alone(
    flavour: str, family: str, graphs: Callable[..., tuple], ids_BS: np.ndarray
) -> None:
    """The first row is padding from end to end: an idle slot of a server."""
    model, graph = graphs(family, flavour)
    mask_BS = np.ones_like(ids_BS)
    mask_BS[0] = 0
    expected = torch_logits(model, ids_BS, mask_BS)
    for pieces in ([LENGTH], PIECES):
        assert_same(expected, graph.in_steps(ids_BS, mask_BS, pieces), FP32, mask_BS == 1)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_cache_grows_by_the_new_tokens(
    flavour: str, student: Make, ids_BS: np.ndarray, tmp_path: Path
) -> None:
    """Also where a removed output projection leaves nothing to attend with."""
    _, directory = student("llama", "outputs removed")
    graph = lowered(directory, tmp_path, flavour)  # type: ignore[arg-type]
    _, cache = graph.step(ids_BS[:, :5])
    _, cache = graph.step(ids_BS[:, 5:8], past=cache)
    assert [array.shape for array in cache] == [(2, 2, 8, 16)] * 6
    assert not cache[0].any() and cache[2].any()


@pytest.mark.parametrize("mix", ["factored", "narrow"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_half_precision(
    flavour: str, mix: str, family: str, student: Make, ids_BS: np.ndarray, tmp_path: Path
) -> None:
    model, directory = student(family, mix)
    graph = lowered(directory, tmp_path, flavour, precision="fp16")  # type: ignore[arg-type]
    mask_BS = np.ones_like(ids_BS)
    mask_BS[0, :30] = 0
    expected = torch_logits(model, ids_BS, mask_BS)
    assert_same(expected, graph.in_steps(ids_BS, mask_BS, PIECES), FP16, mask_BS == 1)


@pytest.mark.parametrize("mix", ["factored", "narrow"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_broken_twin_in_half_precision(
    flavour: str, mix: str, student: Make, ids_BS: np.ndarray, tmp_path: Path
) -> None:
    model, directory = student("qwen3", mix)
    graph = lower(directory, flavour=flavour, precision="fp16")  # type: ignore[arg-type]
    change = {
        "factored": scaled("model.layers.0.mlp.down_proj.up.weight", 1.2),
        "narrow": shuffled("model.layers.0.mlp.down_proj.weight", axis=0),
    }
    change[mix](graph)
    save_onnx(graph, tmp_path)
    got = Lowered(tmp_path).in_steps(ids_BS, None, PIECES)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same(torch_logits(model, ids_BS), got, FP16)


@pytest.mark.parametrize("mix", ["factored", "narrow"])
def test_bfloat16_and_the_standard_domain(
    mix: str, family: str, student: Make, ids_BS: np.ndarray, tmp_path: Path
) -> None:
    """ONNX Runtime's CPU provider has no bfloat16, so onnx's own reference runs this graph."""
    model, directory = student(family, mix)
    save_onnx(lower(directory, flavour="standard", precision="bf16"), tmp_path)
    ids_BS = ids_BS[:, :12]
    empty = np.zeros((2, 2, 0, 16), ml_dtypes.bfloat16)
    caches = [f"past_key_values.{n}.{kind}" for n in range(3) for kind in ("key", "value")]
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": np.ones_like(ids_BS),
        "position_ids": np.tile(np.arange(12), (2, 1)),
        "logits_to_keep": np.array([12]),
        **dict.fromkeys(caches, empty),
    }
    logits, *_ = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, inputs)
    assert logits.dtype == ml_dtypes.bfloat16
    assert_same(torch_logits(model, ids_BS), logits.astype(np.float32), BF16)


Break = Callable[[ir.Model], None]


def changed(name: str, other: Callable[[np.ndarray], np.ndarray]) -> Break:
    """Put something else into one initializer."""

    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.Tensor(other(array).astype(array.dtype), name=name)

    return change


def scaled(name: str, factor: float) -> Break:
    return changed(name, lambda array: array * factor)


def shuffled(name: str, axis: int) -> Break:
    """The same neurons in another order than the other matrices of their MLP have."""
    return changed(name, lambda array: np.roll(array, 1, axis))


def without_last_neuron(array_KE: np.ndarray) -> np.ndarray:
    return np.concatenate([array_KE[:-1], np.zeros_like(array_KE[-1:])])


def without_past(model: ir.Model) -> None:
    """Causality counted from the first new token: top-left instead of bottom-right."""
    nodes = {node.name: node for node in model.graph}
    nodes["positions"].replace_input_with(0, nodes["columns"].inputs[0])
    nodes["positions"].replace_input_with(1, nodes["sequence/scalar"].outputs[0])
    model.graph.remove(nodes["past"], safe=True)


def without_padding(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.name == "allowed")
    node.replace_input_with(1, node.inputs[0])


def swapped_rotation(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "RotaryEmbedding" and "layers.0" in (node.name or ""):
            cos, sin = node.inputs[1:3]
            node.replace_input_with(1, sin)
            node.replace_input_with(2, cos)


Q0 = "model.layers.0.self_attn.q_proj"
TWINS: dict[str, tuple[str, Break]] = {
    "a scaled weight": ("llama", scaled(f"{Q0}.down.weight", 1.01)),
    "a scaled norm": ("qwen2", scaled("model.layers.1.input_layernorm.weight", 1.01)),
    "a lost bias": ("qwen2", scaled("model.layers.0.self_attn.v_proj.up.bias", 0.0)),
    "a wrong rope base": ("llama", scaled("constant/full_attention/inv_freq", 1.05)),
    "the other rope": ("gemma3_text", scaled("constant/sliding_attention/inv_freq", 0.5)),
    "a window one too wide": ("mistral", scaled("constant/window", 25 / 24)),
    "a window one too narrow": ("gemma3_text", scaled("constant/window", 23 / 24)),
    "a lost causal offset": ("llama", without_past),
    "padding seen": ("llama", without_padding),
    "sine for cosine": ("qwen3", swapped_rotation),
    "a norm without its one": (
        "gemma3_text",
        scaled("model.layers.0.self_attn.q_norm.weight", 0.5),
    ),
    "a wrong embedding scale": ("gemma3_text", scaled("constant/embedding_scale", 1.01)),
    "the wrong head": ("qwen3", scaled("model.embed_tokens.weight", 1.01)),
}
MLP0, MLP2 = "model.layers.0.mlp", "model.layers.2.mlp"
NARROW_TWINS: dict[str, tuple[str, Break]] = {
    "another order before down": ("llama", shuffled(f"{MLP0}.down_proj.weight", axis=0)),
    "another order in up": ("gemma3_text", shuffled(f"{MLP2}.up_proj.weight", axis=1)),
    "another order of activations": ("llama", shuffled(f"{MLP2}.gate_proj.weight", axis=1)),
    "a lost neuron": ("qwen2", changed(f"{MLP0}.down_proj.weight", without_last_neuron)),
}
TWINS |= NARROW_TWINS


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_is_caught(
    twin: str,
    flavour: str,
    student: Make,
    ids_BS: np.ndarray,
    padded_BS: np.ndarray,
    tmp_path: Path,
) -> None:
    family, change = TWINS[twin]
    model, directory = student(family, "narrow" if twin in NARROW_TWINS else "factored")
    graph = lower(directory, flavour=flavour, precision="fp32")  # type: ignore[arg-type]
    change(graph)
    save_onnx(graph, tmp_path)
    got = Lowered(tmp_path).in_steps(ids_BS, padded_BS, PIECES)
    expected = torch_logits(model, ids_BS, padded_BS)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same(expected, got, FP32, padded_BS == 1)
