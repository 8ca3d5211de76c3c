"""A key/value cache in host memory with room to grow: the engine appends to it in place.

2·L arrays [rows, H, columns, D] hold more columns, and after rows have ended more rows, than are in
use. They are replaced only when a step needs more of either, one after another, so that joining,
ending and growing rows takes no second copy of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.host_cache import require_rows

COLUMNS = 64
"""Room for columns comes in multiples of this."""


class SlabCache:
    """See `deploy.runner.Cache`.

    `slabs`: the arrays; `views()`: the part of them that the rows in use take. `bound`: whatever
    the engine keeps for as long as the arrays stay what and where they are.
    """

    def __init__(self, slabs: Sequence[np.ndarray], batch: int, length: int = 0) -> None:
        self.slabs = list(slabs)
        self.batch = batch
        self.length = length
        self.bound: Any = None

    @classmethod
    def empty(
        cls, tensors: int, batch: int, heads: int, head_dim: int, dtype: np.dtype
    ) -> SlabCache:
        return cls([np.empty((batch, heads, 0, head_dim), dtype) for _ in range(tensors)], batch)

    def views(self) -> list[np.ndarray]:
        """2·L contiguous arrays [B, H, columns, D]."""
        return [slab[: self.batch] for slab in self.slabs]

    def reserve(self, columns: int, rows: int = 0) -> None:
        """Make room for so many columns and rows."""
        have_rows, _, have_columns, _ = self.slabs[0].shape
        rows = max(rows, have_rows)
        if columns > have_columns or rows > have_rows:
            self._move(rows, max(have_columns, -(-columns // COLUMNS) * COLUMNS))

    def select(self, rows: Sequence[int]) -> SlabCache:
        require_rows(rows, self.batch)
        chosen = np.asarray(list(rows), dtype=np.int64)
        return SlabCache([s.take(chosen, axis=0) for s in self.slabs], len(chosen), self.length)

    def compact(self, rows: Sequence[int], columns: int) -> SlabCache:
        require_rows(rows, self.batch)
        self._require_columns(columns)
        if list(rows) != sorted(set(rows)):
            raise ValueError(f"rows {list(rows)} are not in ascending order")
        for slab in self.slabs:
            for place, row in enumerate(rows):
                slab[place, :, : self.length - columns] = slab[row, :, columns : self.length]
        self.batch, self.length, self.bound = len(rows), self.length - columns, None
        return self

    def concat(self, other: SlabCache) -> SlabCache:
        return self.select(range(self.batch)).extend(other)

    def extend(self, other: SlabCache) -> SlabCache:
        wide = self.pad_left(max(0, other.length - self.length))
        first, rows = wide.batch, wide.batch + other.batch
        wide.reserve(wide.length, rows)
        wide.batch, wide.bound = rows, None
        wide._put(range(first, rows), other)
        return wide

    def replace(self, rows: Sequence[int], other: SlabCache) -> None:
        if other.length > self.length or len(rows) != other.batch:
            raise ValueError(
                f"{other.batch} rows of {other.length} columns into {len(rows)} rows of "
                f"{self.length}"
            )
        self._put(rows, other)

    def pad_left(self, columns: int) -> SlabCache:
        """`self` when there is nothing to add."""
        if columns < 0:
            raise ValueError(f"{columns} columns of padding")
        if not columns:
            return self
        rows, heads, _, head_dim = self.slabs[0].shape
        empty = (rows, heads, 0, head_dim)
        wide = SlabCache([np.empty(empty, s.dtype) for s in self.slabs], self.batch)
        wide.reserve(self.length + columns)
        wide.length = self.length + columns
        wide._put(range(self.batch), self)
        return wide

    def trim_left(self, columns: int) -> SlabCache:
        return self.select(range(self.batch)).compact(range(self.batch), columns)

    def truncate(self, length: int) -> SlabCache:
        self._require_columns(length)
        shorter = self.select(range(self.batch))
        shorter.length = length
        return shorter

    def _put(self, rows: Sequence[int], other: SlabCache) -> None:
        """The rows of `other`, with zero columns on their left, into the places `rows`."""
        missing = self.length - other.length
        for slab, source in zip(self.slabs, other.slabs, strict=True):
            for row, place in enumerate(rows):
                slab[place, :, :missing] = 0
                slab[place, :, missing : self.length] = source[row, :, : other.length]

    def _move(self, rows: int, columns: int) -> None:
        for index, old in enumerate(self.slabs):
            new = np.empty((rows, old.shape[1], columns, old.shape[3]), old.dtype)
            new[: self.batch, :, : self.length] = old[: self.batch, :, : self.length]
            self.slabs[index] = new
        self.bound = None

    def _require_columns(self, columns: int) -> None:
        if not 0 <= columns <= self.length:
            raise ValueError(f"{columns} columns of a cache with {self.length}")
