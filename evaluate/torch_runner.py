"""A PyTorch model behind the runners' interface.

Shapes: B batch, S new positions, T cached and new positions, K positions with logits, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.quiet import quiet_transformers
from distill.student_format import load_student
from evaluate.runners import Runner


class TorchCache:
    """A transformers cache with the rows of a batch selectable."""

    def __init__(self, values: Any = None, length: int = 0) -> None:
        self.values, self._length = values, length

    @property
    def length(self) -> int:
        return self._length

    def select(self, rows: Sequence[int]) -> TorchCache:
        if self.values is None:
            return TorchCache()
        values = copy.deepcopy(self.values)
        values.batch_select_indices(torch.tensor(list(rows)))
        return TorchCache(values, self._length)

    def extend(self, values: Any, positions: int) -> None:
        self.values, self._length = values, self._length + positions


class TorchRunner:
    """A causal language model of transformers behind the runners' interface."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def max_context(self) -> int:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else 2**31 - 1

    def describe(self) -> dict[str, Any]:
        """Engine, precision, device and threads."""
        return {
            "engine": "pytorch",
            "precision": str(self.model.dtype).removeprefix("torch."),
            "provider": str(self.model.device),
            "threads": torch.get_num_threads(),
        }

    def new_cache(self, batch: int) -> TorchCache:
        return TorchCache()

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: TorchCache,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        batch, new = input_ids_BS.shape
        total = cache.length + new
        if attention_mask_BT is None:
            attention_mask_BT = np.ones((batch, total), np.int64)
        if position_ids_BS is None:
            position_ids_BS = np.broadcast_to(np.arange(cache.length, total), (batch, new))
        device = self.model.device
        with torch.no_grad():
            output = self.model(
                input_ids=torch.from_numpy(input_ids_BS.astype(np.int64)).to(device),
                attention_mask=torch.from_numpy(attention_mask_BT.astype(np.int64)).to(device),
                position_ids=torch.from_numpy(position_ids_BS.astype(np.int64)).to(device),
                past_key_values=cache.values,
                use_cache=True,
                logits_to_keep=min(new, logits_to_keep or new),
            )
        cache.extend(output.past_key_values, new)
        return output.logits.float().cpu().numpy()


def as_runner(model: Any) -> Runner:
    """`model` itself when it is a runner; a transformers model is wrapped."""
    return TorchRunner(model) if isinstance(model, PreTrainedModel) else model


def open_student(directory: Path, threads: int) -> TorchRunner:
    """A student directory, computed in float32 whatever it is stored in."""
    torch.set_num_threads(threads)
    with quiet_transformers():
        return TorchRunner(load_student(directory, torch.float32))
