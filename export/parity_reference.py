"""The PyTorch student as the parity gate sees it: what is right at a position of a bare row.

Shapes: T tokens of a row, N positions asked for, V vocabulary, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.quiet import quiet_transformers
from distill.resources import available_memory_bytes
from distill.student_format import load_student

FLOAT64_BYTES = 10  # a parameter's own 8, and a quarter more for the activations


class Reference:
    """A student directory in float32, one unpadded row at a time.

    What a row came to is remembered as hidden states, so that a second graph of the same student
    costs little. `arithmetic`: "float32", or "float64" once `sharpen` was called.
    """

    def __init__(self, student_directory: Path) -> None:
        self.directory = Path(student_directory)
        with quiet_transformers():
            self.model: Any = load_student(self.directory, torch.float32)
        self.config = self.model.config
        self._hidden: dict[bytes, Tensor] = {}
        self._greedy: dict[tuple[bytes, int], np.ndarray] = {}
        self.arithmetic = "float32"

    def sharpen(self) -> bool:
        """Compute in float64 from now on; False where it already does or memory is too short."""
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.arithmetic == "float64" or available_memory_bytes() < FLOAT64_BYTES * parameters:
            return False
        self.model.double()
        self._hidden.clear()
        self.arithmetic = "float64"
        return True

    @torch.no_grad()
    def logits(self, row_T: np.ndarray, positions_N: np.ndarray) -> Tensor:
        """float32 [N, V]: one pass over the whole row, without a cache."""
        key = row_T.tobytes()
        if key not in self._hidden:
            ids_1T = torch.from_numpy(row_T)[None]
            out = self.model.model(ids_1T, use_cache=False)
            self._hidden[key] = out.last_hidden_state[0]
        logits_NV = self.model.lm_head(self._hidden[key][torch.from_numpy(positions_N)])
        cap = getattr(self.config, "final_logit_softcapping", None)
        return (logits_NV if not cap else torch.tanh(logits_NV / cap) * cap).float()

    @torch.no_grad()
    def block_outputs(self, row_T: np.ndarray) -> list[Tensor]:
        """What every decoder block adds up to: float32 [T, D] each, before the final norm."""
        outputs: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output)[0].float())

        hooks = [block.register_forward_hook(keep) for block in self.model.model.layers]
        try:
            self.model.model(torch.from_numpy(row_T)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @torch.no_grad()
    def greedy(self, prompt_T: np.ndarray, steps: int) -> np.ndarray:
        """The prompt and `steps` tokens more, each the first choice, decoded with a cache."""
        key = (prompt_T.tobytes(), steps)
        if key not in self._greedy:
            row = list(prompt_T)
            new_1S = torch.from_numpy(prompt_T)[None]
            cache = None
            for _ in range(steps):
                out = self.model(new_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                new_1S = out.logits[:, -1].argmax(-1, keepdim=True)
                row.append(int(new_1S))
            self._greedy[key] = np.array(row, dtype=np.int64)
        return self._greedy[key]

    @property
    def sliding_window(self) -> int | None:
        """The model's attention window in tokens, where it has one."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        slides = kinds is None or "sliding_attention" in kinds
        return int(window) if window and slides else None
