"""A key/value cache in host memory with room to grow: the engine appends to it in place.

2·L arrays [rows, H, columns, D] hold more columns, and after rows have ended more rows, than are in
use. They are replaced only when more of either is needed, one after another, so that joining,
ending and growing rows takes no second copy of the cache; room that is mostly idle goes then too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.host_cache import require_rows

COLUMNS = 64
"""Room for columns comes in multiples of this."""
LARGEST_ROOM = 2
"""Arrays that are replaced keep idle rows and columns up to so many times what is needed."""


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
        """Make room for so many columns and rows, and for those in use.

        Raises: MemoryError, after which what is cached is still there.
        """
        rows, columns = max(rows, self.batch), max(columns, self.length)
        have_rows = min(slab.shape[0] for slab in self.slabs)
        have_columns = min(slab.shape[2] for slab in self.slabs)
        if columns <= have_columns and rows <= have_rows:
            return
        columns = -(-columns // COLUMNS) * COLUMNS
        room = max(rows, have_rows), max(columns, have_columns)
        is_mostly_idle = room[0] * room[1] > LARGEST_ROOM * rows * columns
        self._move(*((rows, columns) if is_mostly_idle else room))

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
        first, rows = self.batch, self.batch + other.batch
        self.reserve(other.length, rows)
        self.shift(max(0, other.length - self.length))
        self.batch, self.bound = rows, None
        self._put(range(first, rows), other)
        return self

    def replace(self, rows: Sequence[int], other: SlabCache) -> None:
        if other.length > self.length or len(rows) != other.batch:
            raise ValueError(
                f"{other.batch} rows of {other.length} columns into {len(rows)} rows of "
                f"{self.length}"
            )
        self._put(rows, other)

    def pad_left(self, columns: int) -> SlabCache:
        """`self` when there is nothing to add."""
        return self.select(range(self.batch)).shift(columns) if columns else self

    def shift(self, columns: int) -> SlabCache:
        if columns < 0:
            raise ValueError(f"{columns} columns of padding")
        if columns:
            old, new = self.length, self.length + columns
            self.reserve(new)
            for view in self.views():
                for cached in view:  # row by row: NumPy copies what overlaps itself
                    cached[:, columns:new] = cached[:, :old]
                    cached[:, :columns] = 0
            self.length = new
        return self

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
        self.bound = None  # first: it points into the arrays, also where memory runs out halfway
        for index, old in enumerate(self.slabs):
            new = np.empty((rows, old.shape[1], columns, old.shape[3]), old.dtype)
            new[: self.batch, :, : self.length] = old[: self.batch, :, : self.length]
            self.slabs[index] = new

    def _require_columns(self, columns: int) -> None:
        if not 0 <= columns <= self.length:
            raise ValueError(f"{columns} columns of a cache with {self.length}")
