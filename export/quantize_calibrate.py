"""GPTQ: rounding errors of one column are made good by the columns still to be rounded.

Source: Frantar et al., "GPTQ" (arXiv 2210.17323), with the blocks' scales fitted as in
`export.quantize_blocks`, just before each block is rounded.

Shapes: B texts, T tokens of a text, N rows (out_features), K columns (in_features).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from export.ort_session import SessionSettings, open_session
from export.quantize_blocks import ROWS_AT_A_TIME, Blocks, fitted_block, rounded
from export.session import MODEL, OrtModel

DAMPING = 0.01
ROWS, TOKENS = 32, 128
ROWS_A_CALL = 8


def self_text(
    model: OrtModel, *, rows: int = ROWS, tokens: int = TOKENS, seed: int = 0
) -> np.ndarray:
    """Text that the graph itself writes, [rows, tokens]: sampled at temperature 1 from the start
    token. It needs no data, and it is the text that the model knows best."""
    rng = np.random.default_rng(seed)
    ids_BT = np.full((rows, 1), _start_token(model.config), np.int64)
    past = None
    for position in range(tokens - 1):
        positions_B1 = np.full((rows, 1), position, np.int64)
        logits_B1V, past = model.step(ids_BT[:, -1:], np.ones_like(ids_BT), positions_B1, past, 1)
        logits_BV = logits_B1V[:, -1]
        chances_BV = np.exp(logits_BV - logits_BV.max(-1, keepdims=True)).cumsum(-1)
        drawn_B1 = rng.random((rows, 1)) * chances_BV[:, -1:]
        chosen_B1 = (chances_BV >= drawn_B1).argmax(-1)[:, None]
        ids_BT = np.concatenate([ids_BT, chosen_B1], axis=1)
    return ids_BT


def input_covariances(
    model: OrtModel, values: Sequence[str], ids_BT: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean of x xᵀ [K, K] of each named value [..., K] of the graph, over every token."""
    path = model.directory / MODEL
    graph = onnx.load(path, load_external_data=False)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    session = open_session(path, SessionSettings(), graph=graph.SerializeToString())
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(ids_BT), ROWS_A_CALL):
        part_BT = ids_BT[start : start + ROWS_A_CALL]
        positions_BT = np.arange(part_BT.shape[1])[None].repeat(len(part_BT), 0)
        feed = model.feed(part_BT, np.ones_like(part_BT), positions_BT)
        for name, array in zip(values, session.run(list(values), feed), strict=True):
            x_TK = array.reshape(-1, array.shape[-1])
            sums[name] = sums.get(name, 0) + x_TK.T @ x_TK
    return {name: total / ids_BT.size for name, total in sums.items()}


def _start_token(config: dict[str, Any]) -> int:
    """bos, or what stands for it in models without."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = config.get(key)
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int):
            return token
    return 0


def gptq_blocks(
    w_NK: np.ndarray, covariance_KK: np.ndarray, bits: int, block: int, *, symmetric: bool
) -> Blocks:
    """Quantise w so that (w − w') x is small for inputs of this covariance."""
    rows, columns = w_NK.shape
    upper_KK = _inverse_upper(covariance_KK)
    importance_K = np.diag(covariance_KK).astype(np.float32)
    q_NK = np.empty((rows, columns), np.uint8)
    scale_NG = np.empty((rows, columns // block), np.float32)
    zero_NG = np.empty((rows, columns // block), np.uint8)
    for first in range(0, rows, ROWS_AT_A_TIME):
        part = slice(first, first + ROWS_AT_A_TIME)
        left_MK = w_NK[part].astype(np.float32)
        for group, start in enumerate(range(0, columns, block)):
            columns_B = slice(start, start + block)
            scale_M, zero_M = fitted_block(
                left_MK[:, columns_B], bits, symmetric, importance_K[columns_B]
            )
            q_MB, error_MB = _rounded_columns(
                left_MK[:, columns_B], scale_M, zero_M, bits, upper_KK[columns_B, columns_B]
            )
            left_MK[:, start + block :] -= error_MB @ upper_KK[columns_B, start + block :]
            q_NK[part, columns_B] = q_MB
            scale_NG[part, group], zero_NG[part, group] = scale_M, zero_M
    return Blocks(q_NK, scale_NG, zero_NG, bits)


def _rounded_columns(
    w_MB: np.ndarray, scale_M: np.ndarray, zero_M: np.ndarray, bits: int, upper_BB: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Integers of one block's columns, and what each column's error weighs for those after it."""
    left_BM = w_MB.T.copy()
    q_BM, error_BM = np.empty(left_BM.shape, np.uint8), np.empty_like(left_BM)
    for j, w_M in enumerate(left_BM):
        q_M = rounded(w_M, scale_M, zero_M, bits)
        q_BM[j] = q_M
        error_BM[j] = (w_M - (q_M - zero_M) * scale_M) / upper_BB[j, j]
        left_BM[j + 1 :] -= upper_BB[j, j + 1 :, None] * error_BM[j]
    return q_BM.T, error_BM.T


def _inverse_upper(covariance_KK: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the damped inverse, float32."""
    damped = covariance_KK.astype(np.float64)
    damping = DAMPING * max(float(np.diag(damped).mean()), 1e-12)
    damped[np.diag_indices_from(damped)] += damping
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
