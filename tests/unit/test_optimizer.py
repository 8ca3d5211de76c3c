"""Muon's orthogonalisation, Adam against torch's, the schedule, and the state on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.optimizer import (
    ADAM_BETAS,
    ADAM_EPSILON,
    ADAM_RMS,
    FINAL_FRACTION,
    Muon,
    _iterated_on_gram,
    cosine_scale,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    orthogonalised,
    set_learning_rate,
)

SHAPES = [(24, 60), (60, 24), (32, 32)]


class Toy(nn.Module):
    """Matrices of both orientations, an empty one (a removed module's), a vector, d and g."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(6, 10))
        self.tall = nn.Parameter(torch.randn(10, 6))
        self.empty = nn.Parameter(torch.randn(6, 0))
        self.norm = nn.Parameter(torch.randn(7))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.module = nn.Module()
        self.module.retention = nn.Parameter(torch.ones(()))
        self.module.gate_R = nn.Parameter(torch.ones(4))


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        set_learning_rate(optimizer, cosine_scale(step, 10))
        optimizer.step()
        optimizer.zero_grad()


def toy_optimizer(model: nn.Module, name: str = "muon") -> Muon:
    return make_optimizer(model, name=name, learning_rate=1e-2, allocation_rate=3e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_keeps_singular_vectors_and_brings_values_near_one(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape)
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = 1e-3 * U @ torch.diag(torch.linspace(0.1, 1, len(values))) @ Vh
    result = orthogonalised(matrix[None])[0]
    inner = U.T @ result @ Vh.T
    assert result.shape == shape
    assert 0.6 < float(inner.diagonal().min()) and float(inner.diagonal().max()) < 1.25
    assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 0.01
    plain = U.T @ (matrix / matrix.norm()) @ Vh.T
    assert float(plain.diagonal().min()) < 0.6, "the input is not orthogonal by itself"


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_equals_the_published_iteration(shape: tuple[int, int]) -> None:
    """X ← aX + (bA + cA²)X with A = XXᵀ, in float64, on a matrix of a gradient's wide spectrum."""
    low_rank = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    matrix = low_rank + 1e-3 * torch.randn(shape)
    x = (matrix if shape[0] <= shape[1] else matrix.T).double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = x if shape[0] <= shape[1] else x.T
    torch.testing.assert_close(
        orthogonalised(matrix[None])[0].double(), expected, rtol=0, atol=0.02
    )


@pytest.mark.parametrize("shape", [(4, 32), (40, 5)])
def test_narrow_matrices_are_not_rounded_to_bfloat16(shape: tuple[int, int]) -> None:
    matrix = torch.randn(1, *shape)
    torch.testing.assert_close(orthogonalised(matrix, torch.bfloat16), orthogonalised(matrix))
    square = torch.randn(1, 8, 8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            orthogonalised(square, torch.bfloat16), orthogonalised(square), check_dtype=False
        )


def test_orthogonalised_takes_zero_and_empty_matrices() -> None:
    assert not orthogonalised(torch.zeros(2, 4, 6)).any()
    assert orthogonalised(torch.zeros(2, 4, 0)).shape == (2, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_one_batch_do_not_touch_one_another(dtype: torch.dtype) -> None:
    """Small beside large, silent beside loud: each comes out as it does alone."""
    batch = torch.randn(3, 8, 24) * torch.tensor([1e-3, 0, 1e3])[:, None, None]
    together = orthogonalised(batch, dtype)
    for matrix, result in zip(batch, together, strict=True):
        torch.testing.assert_close(orthogonalised(matrix[None], dtype)[0], result)


def test_a_step_moves_every_matrix_however_many_share_a_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill.optimizer.ELEMENTS_AT_ONCE", 16 * 24)
    shapes = [(4, 6)] * 37 + [(6, 4)] * 2 + [(5, 3)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in parameters]
    for parameter, twin in zip(parameters, alone, strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    Muon(parameters, lr=0.01).step()
    for parameter, twin in zip(parameters, alone, strict=True):
        before = twin.detach().clone()
        Muon([twin], lr=0.01).step()
        torch.testing.assert_close(parameter, twin)
        assert not torch.equal(before, twin)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_muon_update_is_as_large_as_adams(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    before = parameter.detach().clone()
    parameter.grad = 1e-4 * torch.randn(shape)
    Muon([parameter], lr=0.01).step()
    change = (before - parameter.detach()) / 0.01
    assert float(change.square().mean().sqrt()) == pytest.approx(ADAM_RMS, rel=0.25)
    assert float((change * parameter.grad).sum()) > 0, "it goes down the gradient"


def torch_adamw(model: nn.Module) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=1e-2, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=0.0
    )


def assert_equal_models(actual: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)


def test_adam_equals_torch_adamw_without_decay() -> None:
    torch.manual_seed(1)
    ours = Toy()
    theirs = Toy()
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer(ours, name="adamw", learning_rate=1e-2, allocation_rate=1e-2)
    reference = torch_adamw(theirs)
    for step in range(6):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        reference.step()
    assert_equal_models(ours, theirs)
    gradients(theirs, 6)
    reference.step()
    with pytest.raises(AssertionError):
        assert_equal_models(ours, theirs)


def test_muon_takes_the_matrices_and_adam_the_rest_at_their_own_rates() -> None:
    model = Toy()
    optimizer = toy_optimizer(model)
    run(model, optimizer, range(1))
    fields = {n: set(optimizer.state.get(p, {})) for n, p in model.named_parameters()}
    adam = {"step", "mean", "square"}
    assert fields == {
        "wide": {"momentum"}, "tall": {"momentum"}, "empty": {"momentum"}, "norm": adam,
        "module.retention": adam, "module.gate_R": adam, "frozen": set(),
    }  # fmt: skip
    set_learning_rate(optimizer, 0.5)
    rate_of = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rate_of[id(model.wide)] == rate_of[id(model.norm)] == pytest.approx(0.5e-2)
    assert rate_of[id(model.module.gate_R)] == pytest.approx(1.5e-2)
    assert id(model.frozen) not in rate_of


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_from_disk_gives_the_identical_next_steps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    straight = Toy()
    optimizer = toy_optimizer(straight, name)
    run(straight, optimizer, range(3))
    save_file(
        optimizer_tensors(optimizer, list(straight.named_parameters())), tmp_path / "o.safetensors"
    )
    resumed = Toy()
    resumed.load_state_dict(straight.state_dict())
    forgetful = Toy()
    forgetful.load_state_dict(straight.state_dict())
    run(straight, optimizer, range(3, 6))
    second = toy_optimizer(resumed, name)
    stored: dict[str, Tensor] = load_file(tmp_path / "o.safetensors")
    load_optimizer_tensors(second, list(resumed.named_parameters()), stored)
    run(resumed, second, range(3, 6))
    run(forgetful, toy_optimizer(forgetful, name), range(3, 6))
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not torch.equal(straight.wide, forgetful.wide), "the state matters"


def test_state_of_an_unknown_parameter_is_an_error() -> None:
    model = Toy()
    with pytest.raises(KeyError):
        load_optimizer_tensors(
            toy_optimizer(model), list(model.named_parameters()), {"gone|momentum": torch.ones(1)}
        )


def test_the_schedule_warms_up_and_ends_low() -> None:
    scales = [cosine_scale(step, 200) for step in range(200)]
    assert scales[0] == pytest.approx(0.1, rel=0.01)
    assert max(scales) == scales[9] and scales[9] > 0.98
    assert all(a < b for a, b in zip(scales[:9], scales[1:10], strict=True))
    assert all(a > b for a, b in zip(scales[9:], scales[10:], strict=False))
    assert scales[-1] == pytest.approx(FINAL_FRACTION, rel=0.02)
    assert cosine_scale(0, 1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_one_direction_rules_stays_bounded(dtype: torch.dtype) -> None:
    """Rounding must not grow: the Gram form of the iteration explodes here in bfloat16."""
    torch.manual_seed(0)
    matrix = 1e-3 * torch.randn(192, 1536) + torch.randn(192, 1) @ torch.randn(1, 1536)
    values = torch.linalg.svdvals(orthogonalised(matrix[None], dtype)[0].float())
    assert 0.5 < values.max() < 1.3
    exploded = torch.linalg.svdvals(
        _iterated_on_gram((matrix / matrix.norm())[None].bfloat16()).float()
    )
    assert not exploded.max() < 1.3
