"""A sharded teacher in a world of one process computes what the whole one does; and its outline."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill.artifact import UserError
from distill.sharding import outline, require_equal_shares, shard_layers, whole
from distill.statistics import decoder_layers
from distill.teacher import target_modules


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield Accelerator(cpu=True)
    torch.distributed.destroy_process_group()


def sharded_and_whole(
    model: PreTrainedModel, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedModel]:
    reference = copy.deepcopy(model)
    shard_layers(model, accelerator.device)
    return model, reference


def test_layers_are_shared_out_and_the_rest_is_whole(
    accelerator: Accelerator, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model, reference = sharded_and_whole(tiny_model("qwen3"), accelerator)
    ids_BT = torch.arange(12).view(2, 6)
    expected_BTD = reference.model(input_ids=ids_BT).last_hidden_state
    assert torch.equal(model.model(input_ids=ids_BT).last_hidden_state, expected_BTD)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == name.startswith("model.layers."), name
        assert torch.equal(whole(parameter), reference.get_parameter(name)), name


def test_a_layer_runs_alone_after_an_interrupted_call(
    accelerator: Accelerator, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """What the refit does: stop the model at its first layer, then run layers one at a time."""
    from distill.refit import _first_input, _layer_arguments

    model, reference = sharded_and_whole(tiny_model("llama"), accelerator)
    ids_BT = torch.arange(12).view(2, 6)
    hidden = {}
    for each in (model, reference):
        state = _first_input(each, ids_BT)
        for layer, kwargs in zip(decoder_layers(each), _layer_arguments(each, ids_BT), strict=True):
            output = layer(state, **kwargs)
            state = output[0] if isinstance(output, tuple) else output
        hidden[each is model] = state
    assert torch.equal(hidden[True], hidden[False])
    assert all(isinstance(p, DTensor) for p in decoder_layers(model).parameters())


def test_the_outline_lacks_the_targets_weights_only(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model("gemma3_text")
    copied = outline(model)
    weights = {f"{name}.weight" for name in target_modules(model)}
    for name, parameter in copied.named_parameters():
        assert parameter.is_meta == (name in weights), name
        assert parameter.is_meta or torch.equal(parameter, model.get_parameter(name)), name
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert not any(parameter.is_meta for parameter in model.parameters())


class Processes:
    def __init__(self, count: int) -> None:
        self.num_processes = count


@pytest.mark.parametrize(
    ("processes", "sequences", "micro_batch", "said"),
    [(1, 4, 2, "one process"), (2, 6, 2, "multiple of 4"), (3, 4, 1, "multiple of 3")],
)
def test_unequal_shares_are_refused(
    processes: int, sequences: int, micro_batch: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        require_equal_shares(Processes(processes), sequences, micro_batch)  # type: ignore[arg-type]


def test_equal_shares_pass() -> None:
    for processes, sequences, micro_batch in ((2, 2, 4), (2, 8, 2), (4, 4, 1)):
        require_equal_shares(Processes(processes), sequences, micro_batch)  # type: ignore[arg-type]
