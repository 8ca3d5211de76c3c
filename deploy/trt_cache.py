"""A key/value cache in device memory for TensorRT: 2·L tensors [B, H, P, D] in one block.

Physical columns P may exceed the cache's length: `spare` columns on the left are padding of the
runner's own, so that many decode steps in a row have one shape and can be one CUDA graph. Pitches
and widths are in bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.cuda import Cuda
from deploy.host_cache import HostCache

ALIGNMENT = 512


class Block:
    """Device memory for `count` tensors of `size_bytes` each, freed with this object."""

    def __init__(self, cuda: Cuda, count: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._stride = -(-max(size_bytes, 1) // ALIGNMENT) * ALIGNMENT
        self.base = cuda.allocate(count * self._stride)
        self.pointers = [self.base + index * self._stride for index in range(count)]
        weakref.finalize(self, cuda.free, self.base)


@dataclass(frozen=True)
class Layout:
    """What all caches of an engine share: tensors, heads and size of a column's entry."""

    tensors: int
    heads: int
    head_dim: int
    dtype: np.dtype

    @property
    def entry_bytes(self) -> int:
        """Bytes of one column of one head."""
        return self.head_dim * self.dtype.itemsize

    def size_bytes(self, batch: int, columns: int) -> int:
        return batch * self.heads * columns * self.entry_bytes


class TrtCache:
    """See `deploy.runner.Cache`. Operations other than a step go through host memory."""

    def __init__(self, cuda: Cuda, stream: int, layout: Layout, batch: int) -> None:
        self._cuda, self._stream = cuda, stream
        self.layout = layout
        self.batch = batch
        self.columns = 0
        self.spare = 0
        self.block = Block(cuda, layout.tensors, 0)

    @property
    def length(self) -> int:
        return self.columns - self.spare

    def adopt(self, block: Block, columns: int) -> None:
        """Take over the longer tensors that the engine has written."""
        self.block, self.columns = block, columns

    def widen(self, columns: int) -> None:
        """Move to `columns` columns: zero padding is added on the left, or own padding dropped."""
        old, entry = self.block, self.layout.entry_bytes
        new = Block(self._cuda, self.layout.tensors, self.layout.size_bytes(self.batch, columns))
        kept = min(self.length, columns)
        for target, source in zip(new.pointers, old.pointers, strict=True):
            self._cuda.clear(target, new.size_bytes, self._stream)
            if kept:
                self._cuda.copy_rows(
                    target + (columns - kept) * entry,
                    columns * entry,
                    source + (self.columns - kept) * entry,
                    self.columns * entry,
                    kept * entry,
                    self.batch * self.layout.heads,
                    self._stream,
                )
        self._cuda.synchronise(self._stream)  # before `old` is freed
        self.block, self.columns, self.spare = new, columns, columns - kept

    def to_host(self) -> HostCache:
        """Without the runner's own padding."""
        shape = (self.batch, self.layout.heads, self.columns, self.layout.head_dim)
        values = [np.empty(shape, self.layout.dtype) for _ in self.block.pointers]
        for value, pointer in zip(values, self.block.pointers, strict=True):
            self._cuda.download(value, pointer, self._stream)
        self._cuda.synchronise(self._stream)
        return HostCache(values).trim_left(self.spare)

    def select(self, rows: Sequence[int]) -> TrtCache:
        return self._moved(self.to_host().select(rows))

    def compact(self, rows: Sequence[int], columns: int) -> TrtCache:
        return self._moved(self.to_host().compact(rows, columns))

    def extend(self, other: TrtCache) -> TrtCache:
        return self.concat(other)

    def concat(self, other: TrtCache) -> TrtCache:
        return self._moved(self.to_host().concat(other.to_host()))

    def replace(self, rows: Sequence[int], other: TrtCache) -> None:
        host = self.to_host()
        host.replace(rows, other.to_host())
        moved = self._moved(host)
        self.block, self.columns, self.spare = moved.block, moved.columns, moved.spare

    def pad_left(self, columns: int) -> TrtCache:
        return self._moved(self.to_host().pad_left(columns))

    def shift(self, columns: int) -> TrtCache:
        return self.pad_left(columns)

    def trim_left(self, columns: int) -> TrtCache:
        return self._moved(self.to_host().trim_left(columns))

    def truncate(self, length: int) -> TrtCache:
        return self._moved(self.to_host().truncate(length))

    def _moved(self, host: HostCache) -> TrtCache:
        cache = TrtCache(self._cuda, self._stream, self.layout, host.batch)
        size_bytes = self.layout.size_bytes(host.batch, host.length)
        cache.adopt(Block(self._cuda, self.layout.tensors, size_bytes), host.length)
        for value, pointer in zip(host.values, cache.block.pointers, strict=True):
            self._cuda.upload(pointer, np.ascontiguousarray(value), self._stream)
        self._cuda.synchronise(self._stream)
        return cache
