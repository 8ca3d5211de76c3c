"""Weights as small integers: blocks of a row share one scale and one zero point.

Every block is fitted on its own: several clipping widths are tried, the scale of each is refitted
by least squares, and the one with the least weighted squared error is kept.

Shapes: N rows (out_features), K columns (in_features), G = K ÷ block groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTHS = (0.75, 0.82, 0.88, 0.94, 1.0)
"""Fractions of a block's range that may be kept; the rest is clipped. At 8 bits only the last."""
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Blocks:
    """w ≈ (q − zero) · scale. `q_NK` and `zero_NG` are uint8, `scale_NG` float32."""

    q_NK: np.ndarray
    scale_NG: np.ndarray
    zero_NG: np.ndarray
    bits: int

    @property
    def block(self) -> int:
        return self.q_NK.shape[1] // self.scale_NG.shape[1]

    def dequantised(self) -> np.ndarray:
        """float32 [N, K]."""
        rows, groups = self.scale_NG.shape
        q_NGB = self.q_NK.reshape(rows, groups, -1).astype(np.float32)
        return ((q_NGB - self.zero_NG[..., None]) * self.scale_NG[..., None]).reshape(rows, -1)


def quantised_blocks(
    w_NK: np.ndarray,
    bits: int,
    block: int,
    *,
    symmetric: bool = False,
    importance_K: np.ndarray | None = None,
) -> Blocks:
    """Quantise each row in blocks of `block` columns, which must divide K.

    Args:
        symmetric: the zero point is the middle, 2^(bits−1), and the scale positive, everywhere.
        importance_K: weight of every column in the squared error, e.g. the mean square of that
            input; None: all the same.
    """
    rows, columns = w_NK.shape
    groups = columns // block
    q_NK = np.empty((rows, columns), np.uint8)
    scale_NG = np.empty((rows, groups), np.float32)
    zero_NG = np.empty((rows, groups), np.uint8)
    importance_GB = None
    if importance_K is not None:
        importance_GB = importance_K.astype(np.float32).reshape(1, groups, block)
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        w_MGB = np.asarray(w_NK[part], np.float32).reshape(-1, groups, block)
        scale, zero = _fitted(w_MGB, bits, symmetric, importance_GB)
        q_NK[part] = rounded(w_MGB, scale, zero, bits).reshape(-1, columns)
        scale_NG[part], zero_NG[part] = scale[..., 0], zero[..., 0]
    return Blocks(q_NK, scale_NG, zero_NG, bits)


def _fitted(
    w_MGB: np.ndarray, bits: int, symmetric: bool, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [M, G, 1] of the least weighted squared error."""
    scale0, zero0 = _range(w_MGB, bits, symmetric)
    if bits == 8:
        return scale0, zero0
    best_scale, best_zero = scale0, zero0
    best = np.full(scale0.shape, np.inf, np.float32)
    for width in WIDTHS:
        scale = scale0 * width
        for zero in {False: (zero0, _centred(w_MGB, scale, bits)), True: (zero0,)}[symmetric]:
            level = rounded(w_MGB, scale, zero, bits) - zero
            weighted = level if importance is None else level * importance
            square = (weighted * level).sum(-1, keepdims=True)
            refitted = (weighted * w_MGB).sum(-1, keepdims=True) / np.maximum(square, 1e-30)
            refitted = np.where((square > 0) & (refitted > 0), refitted, scale)
            error = np.square(level * refitted - w_MGB)
            if importance is not None:
                error *= importance
            error = error.sum(-1, keepdims=True)
            better = error < best
            best = np.where(better, error, best)
            best_scale = np.where(better, refitted, best_scale)
            best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def fitted_block(
    w_NB: np.ndarray, bits: int, symmetric: bool, importance_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [N] of one block of columns."""
    scale, zero = _fitted(w_NB[:, None], bits, symmetric, importance_B[None, None])
    return scale[:, 0, 0], zero[:, 0, 0]


def rounded(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """float32 integers from 0 to 2^bits − 1."""
    return np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1)


def _range(w_MGB: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point that reach a block's extremes."""
    low, high = w_MGB.min(-1, keepdims=True), w_MGB.max(-1, keepdims=True)
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = np.maximum(-low / middle, high / (middle - 1))  # TensorRT takes positive ones alone
        return _not_zero(scale), np.full_like(scale, middle)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _not_zero((high - low) / (2**bits - 1))
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def _centred(w_MGB: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The zero point that clips both ends of a block alike."""
    middle = (w_MGB.min(-1, keepdims=True) + w_MGB.max(-1, keepdims=True)) / 2
    top = 2**bits - 1
    return np.clip(np.rint(top / 2 - middle / scale), 0, top)


def _not_zero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def packed_nibbles(values: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte along the last axis, the first in the low half, an odd end padded."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
    return (values[..., 0::2] | (values[..., 1::2] << 4)).astype(np.uint8)
