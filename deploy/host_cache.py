"""A key/value cache in host memory: 2·L arrays [B, H, T, D], and its operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class HostCache:
    """See `deploy.runner.Cache`. `values` is what the engine takes and gives."""

    def __init__(self, values: Sequence[np.ndarray]) -> None:
        self.values = list(values)

    @property
    def batch(self) -> int:
        return int(self.values[0].shape[0])

    @property
    def length(self) -> int:
        return int(self.values[0].shape[2])

    def select(self, rows: Sequence[int]) -> HostCache:
        require_rows(rows, self.batch)
        chosen = np.asarray(list(rows), dtype=np.int64)
        return HostCache([value.take(chosen, axis=0) for value in self.values])

    def compact(self, rows: Sequence[int], columns: int) -> HostCache:
        return self.select(rows).trim_left(columns)

    def extend(self, other: HostCache) -> HostCache:
        return self.concat(other)

    def concat(self, other: HostCache) -> HostCache:
        length = max(self.length, other.length)
        padded = [cache.pad_left(length - cache.length) for cache in (self, other)]
        pairs = zip(padded[0].values, padded[1].values, strict=True)
        return HostCache([np.concatenate(pair) for pair in pairs])

    def replace(self, rows: Sequence[int], other: HostCache) -> None:
        missing = self.length - other.length
        if missing < 0 or len(rows) != other.batch:
            raise ValueError(
                f"{other.batch} rows of {other.length} columns into {len(rows)} rows of "
                f"{self.length}"
            )
        for index, value in enumerate(self.values):
            if not value.flags.writeable:
                self.values[index] = value = value.copy()
            for place, new in zip(rows, other.values[index], strict=True):
                value[place, :, :missing] = 0
                value[place, :, missing:] = new

    def pad_left(self, columns: int) -> HostCache:
        """`self` when there is nothing to add."""
        if columns < 0:
            raise ValueError(f"{columns} columns of padding")
        if not columns:
            return self
        return HostCache([_padded(value, columns) for value in self.values])

    def shift(self, columns: int) -> HostCache:
        return self.pad_left(columns)

    def trim_left(self, columns: int) -> HostCache:
        self._require_columns(columns)
        return HostCache([np.ascontiguousarray(v[:, :, columns:]) for v in self.values])

    def truncate(self, length: int) -> HostCache:
        self._require_columns(length)
        return HostCache([np.ascontiguousarray(v[:, :, :length]) for v in self.values])

    def _require_columns(self, columns: int) -> None:
        if not 0 <= columns <= self.length:
            raise ValueError(f"{columns} columns of a cache with {self.length}")


def require_rows(rows: Sequence[int], batch: int) -> None:
    """Raises: IndexError for a row that a cache of `batch` rows has not."""
    if not all(0 <= row < batch for row in rows):
        raise IndexError(f"rows {list(rows)} of a cache with {batch} rows")


def _padded(value_BHTD: np.ndarray, columns: int) -> np.ndarray:
    batch, heads, length, size = value_BHTD.shape
    wide = np.zeros((batch, heads, columns + length, size), value_BHTD.dtype)
    wide[:, :, columns:] = value_BHTD
    return wide
