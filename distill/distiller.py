"""What one training step computes: the student's loss against the teacher's recorded outputs.

Shape legend: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses import chunked_kl, hidden_error
from distill.teacher_pass import recorded_blocks


class StepLoss(NamedTuple):
    """``total`` is what is minimised; ``kl`` is in nats per token, ``hidden`` relative."""

    total: Tensor
    kl: Tensor
    hidden: Tensor


class Distiller(nn.Module):
    """The student with the frozen end of its teacher (final norm and head).

    Where one of the two pads its vocabulary further, the KL is over what they share.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, hidden_weight: float
    ) -> None:
        super().__init__()
        self.student = student
        self.hidden_weight = hidden_weight
        self.teacher_norm = teacher.model.norm
        heads = [m.get_output_embeddings().weight for m in (teacher, student)]
        self.vocabulary = min(map(len, heads))
        head_VD = heads[0].detach()[: self.vocabulary]
        self.teacher_head_VD: Tensor
        self.register_buffer("teacher_head_VD", head_VD, persistent=False)

    def forward(
        self, ids_BT: Tensor, teacher_blocks: Sequence[Tensor], weight_BT: Tensor
    ) -> StepLoss:
        """``weight_BT`` weighs positions, 1 on average over the whole training text."""
        with recorded_blocks(self.student) as blocks:
            final_BTD = self.student.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        with torch.no_grad():
            teacher_BTD = self.teacher_norm(teacher_blocks[-1].to(final_BTD.dtype))
        weight_N = weight_BT.flatten() / weight_BT.numel()
        total, kl_N = chunked_kl(
            final_BTD.flatten(0, 1),
            self.student.get_output_embeddings().weight.detach()[: self.vocabulary],
            teacher_BTD.flatten(0, 1),
            self.teacher_head_VD,
            weight_N,
        )
        hidden = blocks_error(blocks, teacher_blocks, weight_BT, self.hidden_weight)
        return StepLoss(total + self.hidden_weight * hidden, kl_N.mean(), hidden.detach())


def blocks_error(
    blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor], weight_BT: Tensor, weight: float
) -> Tensor:
    """The hidden-state term, or 0 where its weight or the two models' shapes rule it out."""
    comparable = len(blocks) == len(teacher_blocks) and (
        blocks[0].shape[-1] == teacher_blocks[0].shape[-1]
    )
    if weight == 0 or not comparable:
        return blocks[-1].new_zeros(())
    return hidden_error(blocks, teacher_blocks, weight_BT)
