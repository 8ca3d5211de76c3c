"""Factored pairs scaled for rows that share one 8-bit scale.

In y = B A x the columns of B are as unequal as the singular values, and the largest sets the scale
of a whole row. What is divided out of B's columns goes into A's rows, each of which has a scale of
its own, so it costs nothing there.

Shapes: E out_features, R rank, D in_features; B is [E, R], A is [R, D].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from export.quantize_file import SourceGraph
from export.quantize_graph import Matrix, weight_of

DOWN, UP = ".down", ".up"


class Balance:
    """The scale of every rank of the pairs whose second matrix is one of `by_row`."""

    def __init__(
        self, source: SourceGraph, matrices: Sequence[Matrix], by_row: Iterable[str]
    ) -> None:
        self._source = source
        self._named = {matrix.name: matrix for matrix in matrices}
        self._scale_R: dict[str, np.ndarray] = {}
        self.add(by_row)

    def add(self, by_row: Iterable[str]) -> frozenset[str]:
        """Balance the pairs of these second matrices too; returns the names of the first ones of
        those that were not yet balanced, whose weights are others now."""
        modules = {name.removesuffix(UP) for name in by_row if name.endswith(UP)}
        new = {m for m in modules - self._scale_R.keys() if m + DOWN in self._named}
        for module in new:
            w_ER = weight_of(self._source, self._named[module + UP])
            self._scale_R[module] = _column_rms(w_ER)
        return frozenset(module + DOWN for module in new)

    def weight(self, matrix: Matrix) -> np.ndarray:
        """float32 [N, K], balanced where the matrix is half of such a pair."""
        w_NK = weight_of(self._source, matrix)
        module, _, part = matrix.name.rpartition(".")
        scale_R = self._scale_R.get(module)
        if scale_R is None:
            return w_NK
        return w_NK * scale_R[:, None] if f".{part}" == DOWN else w_NK / scale_R


def _column_rms(w_ER: np.ndarray) -> np.ndarray:
    """Root mean square of each column; 1 where a column is nothing but zeros."""
    rms_R = np.sqrt(np.square(w_ER, dtype=np.float32).mean(0))
    return np.where(rms_R > 0, rms_R, np.float32(1)).astype(np.float32)
