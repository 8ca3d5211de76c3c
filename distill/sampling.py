"""Batched sampling from a causal LM with forced tokens and preallocated key/value buffers.

Axis legend: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

Prompt = Callable[[], list[int]]


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, written into buffers allocated once for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Allocate from the shapes [B, heads, T, head_dim] of the first keys and values."""
        values = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = key_states.new_empty(
            (*key_states.shape[:2], self.capacity, key_states.shape[3])
        )
        self.value_buffer = values.new_empty((*values.shape[:2], self.capacity, values.shape[3]))
        self.keys, self.values = self.key_buffer[:, :, :0], self.value_buffer[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns views of everything stored so far. RuntimeError beyond the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.key_buffer[:, :, start : self.filled] = key_states
        self.value_buffer[:, :, start : self.filled] = value_states
        self.keys = self.key_buffer[:, :, : self.filled]
        self.values = self.value_buffer[:, :, : self.filled]
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """A cache for `capacity` tokens a row, for each layer of the model's decoder."""
    layers = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[PreallocatedLayer(capacity) for _ in range(layers)])


@torch.no_grad()  # a sharded model's gathered layers may be no inference tensors
def sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    seq_len: int,
    *,
    stop_ids: frozenset[int],
    seed: int,
    advance: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Sample rows of exactly `seq_len` tokens; returns ids_BT int64 on the CPU.

    Each of `prompts` is called for the row's opening tokens, and again for the next document's
    opening whenever the row samples one of `stop_ids`. `advance(n)` is told of n more tokens.
    The result depends on the model, `seed` and the prompts only.
    """
    generator = torch.Generator().manual_seed(seed)
    forced = [prompt() for prompt in prompts]
    start = max(1, min(seq_len, *(len(ids) for ids in forced)))
    ids_BT = torch.empty((len(prompts), seq_len), dtype=torch.int64)
    ids_BT[:, :start] = torch.tensor([ids[:start] for ids in forced])
    forced = [ids[start:] for ids in forced]
    cache = preallocated_cache(model, seq_len)
    begin, reported = 0, 0
    for end in range(start, seq_len):
        logits_BV = _last_logits(model, ids_BT[:, begin:end], cache)
        draws_B = torch.rand(len(prompts), generator=generator, dtype=torch.float64)
        chosen = pick(logits_BV, draws_B).tolist()
        for row, token in enumerate(chosen):
            if forced[row]:
                chosen[row] = forced[row].pop(0)
            elif token in stop_ids:
                forced[row] = prompts[row]()
        ids_BT[:, end] = torch.tensor(chosen)
        begin = end
        if advance and (end % 16 == 0 or end == seq_len - 1):
            advance((end + 1 - reported) * len(prompts))
            reported = end + 1
    if advance and reported < seq_len:
        advance((seq_len - reported) * len(prompts))
    return ids_BT


def _last_logits(model: PreTrainedModel, ids_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
    output = model(
        input_ids=ids_BT.to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float().cpu()


def pick(logits_BV: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sample per row: ids_B from uniform draws_B in [0, 1)."""
    probs_BV = torch.softmax(logits_BV, dim=-1)
    mass_BV = probs_BV.cumsum(dim=-1, dtype=torch.float32)
    target_B1 = (draws_B * mass_BV[:, -1].double()).float()[:, None]
    place_B1 = torch.searchsorted(mass_BV, target_B1, right=True)
    last_B1 = torch.searchsorted(mass_BV, mass_BV[:, -1:].contiguous())
    return torch.minimum(place_B1, last_B1)[:, 0]
