"""Attention by blocks of queries equals transformers' plain attention, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from distill.attention import CAUSAL_BLOCKS, causal_blocks
from distill.sampling import sample_batch

LENGTHS = (1, 7, 64, 150)  # within a block, in even blocks, with a short last one; past two windows


def both(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> tuple[PreTrainedModel, PreTrainedModel]:
    models = tiny_model(family), tiny_model(family)
    for model, name in zip(models, ("eager", CAUSAL_BLOCKS), strict=True):
        model.set_attn_implementation(name)
    return models


@pytest.mark.parametrize("tokens", LENGTHS)
def test_logits_and_gradients_equal_plain_attention(
    family: str, tokens: int, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    plain, blocks = both(tiny_model, family)
    ids_BT = torch.randint(3, 300, (2, tokens), generator=torch.Generator().manual_seed(0))
    logits = [model(input_ids=ids_BT).logits for model in (plain, blocks)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    for each in logits:
        each.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), blocks.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_left_padded_rows(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    plain, blocks = both(tiny_model, family)
    ids_BT = torch.randint(3, 300, (2, 100), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :40] = 0
    found, wanted = (
        model(input_ids=ids_BT, attention_mask=mask_BT).logits for model in (blocks, plain)
    )
    real = mask_BT.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-6)


def test_cached_steps(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    written = [
        sample_batch(model, [lambda: [5, 6, 7]] * 2, 48, stop_ids=frozenset(), seed=3)
        for model in both(tiny_model, family)
    ]
    assert torch.equal(*written)


def test_a_key_beyond_the_block_is_not_read() -> None:
    """The twin: with a mask that is not causal the two differ."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 64, 8, generator=generator) for heads in (4, 2, 2))
    causal = torch.full((64, 64), -1e9).triu(1)[None, None]
    for mask, equal in ((causal, True), (torch.zeros_like(causal), False)):
        found, _ = causal_blocks(torch.nn.Identity(), query, key, value, mask, 8**-0.5)
        scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5 + mask
        wanted = (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
        assert torch.allclose(found, wanted, atol=1e-5) == equal
