"""int4 fitted to a text, and which matrices need 8 bits after all.

Every matrix is rounded by GPTQ. If the whole then departs from the float32 graph on text that was
kept apart, the matrices that lose the largest share of their own output are widened, as many as the
divergence asks for, and it is measured again.

Shapes: B texts, T tokens of a text, N rows (out_features), K columns (in_features), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from export.quantize_blocks import Blocks
from export.quantize_calibrate import ROWS, gptq_blocks, input_covariances, self_text
from export.quantize_graph import Matrix
from export.session import OrtModel

WIDE_BITS = 8
LARGEST_KL = 0.1
HELD_SHARE = 5  # one text in so many is kept apart
SAFETY = 0.8


class Fit:
    """One float32 graph, the text that it is fitted to, and what each matrix lost so far.

    `kl`: mean divergence of the integers written last from the float32 graph, nats per token.
    """

    def __init__(
        self, source_directory: Path, matrices: Sequence[Matrix], text_ids_BT: np.ndarray | None
    ) -> None:
        """`text_ids_BT`: None: text that the graph writes itself."""
        self.model = OrtModel.open(source_directory, verify=False)
        if text_ids_BT is None:
            text_ids_BT = self_text(self.model, rows=ROWS + ROWS // (HELD_SHARE - 1))
        held = max(1, len(text_ids_BT) // HELD_SHARE)
        self.held_BT = text_ids_BT[-held:]
        inputs = sorted({matrix.node.input[0] for matrix in matrices})
        shown_BT = text_ids_BT[:-held] if len(text_ids_BT) > held else text_ids_BT
        self.covariances = input_covariances(self.model, inputs, shown_BT)
        self.lost: dict[str, float] = {}
        self.kl = 0.0

    def blocks(
        self, matrix: Matrix, w_NK: np.ndarray, bits: int, block: int, *, symmetric: bool
    ) -> Blocks:
        covariance_KK = self.covariances[matrix.node.input[0]]
        found = gptq_blocks(w_NK, covariance_KK, bits, block, symmetric=symmetric)
        error_NK = found.dequantised() - w_NK
        self.lost[matrix.name] = _energy(error_NK, covariance_KK) / _energy(w_NK, covariance_KK)
        return found

    def to_widen(self, directory: Path) -> frozenset[str]:
        """Names of the matrices that need 8 bits, after a look at what was written; none: done."""
        self.kl = mean_kl(self.model, OrtModel.open(directory, verify=False), self.held_BT)
        wide = worst(self.lost, SAFETY * LARGEST_KL / self.kl) if self.kl > LARGEST_KL else []
        for name in wide:
            del self.lost[name]
        return frozenset(wide)


def worst(lost: Mapping[str, float], share: float) -> list[str]:
    """The fewest names without which the sum of what is lost is at most `share` of what it is."""
    left, allowed, names = sum(lost.values()), share * sum(lost.values()), []
    for name in sorted(lost, key=lambda name: -lost[name]):
        if left <= allowed:
            break
        names.append(name)
        left -= lost[name]
    return names


def mean_kl(expected: OrtModel, got: OrtModel, ids_BT: np.ndarray) -> float:
    """Mean KL divergence of next-token distributions over every position, nats."""
    total = 0.0
    for ids_T in ids_BT:
        log_p_TV, log_q_TV = (_log_softmax(model, ids_T) for model in (expected, got))
        total += float((np.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum())
    return total / ids_BT.size


def _log_softmax(model: OrtModel, ids_T: np.ndarray) -> np.ndarray:
    ids_1T, positions_1T = ids_T[None], np.arange(len(ids_T))[None]
    logits_TV = model.step(ids_1T, np.ones_like(ids_1T), positions_1T)[0][0]
    logits_TV = logits_TV.astype(np.float32)
    logits_TV -= logits_TV.max(-1, keepdims=True)
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


def _energy(w_NK: np.ndarray, covariance_KK: np.ndarray) -> float:
    """Mean square of w x over inputs of this covariance."""
    return float(((w_NK @ covariance_KK) * w_NK).sum()) + 1e-30
