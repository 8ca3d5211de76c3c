"""A cache with room to grow: how much room, how much memory moving takes, and running out of it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import deploy.slab_cache
from deploy.host_cache import HostCache
from deploy.slab_cache import COLUMNS, LARGEST_ROOM, SlabCache

TENSORS, HEADS, HEAD_DIM = 8, 2, 16


def filled(rows: int, columns: int, seed: int = 0) -> SlabCache:
    cache = SlabCache.empty(TENSORS, rows, HEADS, HEAD_DIM, np.dtype(np.float32))
    cache.reserve(columns)
    rng = np.random.default_rng(seed)
    for slab in cache.slabs:
        slab[:, :, :columns] = rng.normal(size=(rows, HEADS, columns, HEAD_DIM))
    cache.length = columns
    return cache


def host(cache: SlabCache) -> HostCache:
    return HostCache([view[:, :, : cache.length].copy() for view in cache.views()])


def assert_equal(cache: SlabCache, expected: HostCache) -> None:
    for found, value in zip(host(cache).values, expected.values, strict=True):
        np.testing.assert_array_equal(found, value)


def room(cache: SlabCache) -> int:
    return cache.slabs[0].shape[0] * cache.slabs[0].shape[2]


def test_room_follows_what_is_in_use() -> None:
    """A long phase of few rows, then a short one of many: not the product of both."""
    cache = filled(1, 40 * COLUMNS).compact([0], 39 * COLUMNS)
    expected = host(cache).concat(host(filled(31, COLUMNS, seed=1)))
    cache = cache.extend(filled(31, COLUMNS, seed=1))
    assert room(cache) <= LARGEST_ROOM * 32 * COLUMNS
    assert_equal(cache, expected)
    expected = host(cache).compact([3], 0)
    cache = cache.compact([3], 0)
    cache.reserve(40 * COLUMNS)
    assert room(cache) <= LARGEST_ROOM * 40 * COLUMNS
    assert_equal(cache, expected)


def test_idle_room_of_the_same_order_stays() -> None:
    cache = filled(3, COLUMNS).compact([0, 2], 0)
    cache.reserve(COLUMNS + 1)
    assert cache.slabs[0].shape[::2] == (3, 2 * COLUMNS)


@pytest.mark.parametrize("columns", [3, COLUMNS, 5 * COLUMNS])
def test_shifting_and_extending_equal_the_hosts(columns: int) -> None:
    """With room and without."""
    cache, other = filled(2, COLUMNS - 3), filled(1, COLUMNS - 3 + columns, seed=1)
    assert_equal(cache.pad_left(columns), host(cache).pad_left(columns))
    expected = host(cache).concat(host(other))
    assert_equal(filled(2, COLUMNS - 3).shift(columns), host(cache).pad_left(columns))
    assert_equal(cache.extend(other), expected)


@pytest.mark.parametrize("use", ["shift", "extend"])
def test_no_second_cache_is_needed(use: str) -> None:
    """Of the arrays that are replaced, one at a time is there twice."""
    tracemalloc.start()
    try:
        cache, other = filled(4, 4 * COLUMNS), filled(1, 8 * COLUMNS)
        tracemalloc.reset_peak()
        cache = cache.shift(4 * COLUMNS) if use == "shift" else cache.extend(other)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now >= sum(slab.nbytes for slab in cache.slabs)
    assert peak - now <= 1.1 * cache.slabs[0].nbytes


def test_memory_that_runs_out_halfway_leaves_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may point into arrays that are gone, and another attempt succeeds."""
    cache = filled(2, COLUMNS)
    expected, made, empty = host(cache), [], np.empty

    def scarce(*args: object) -> np.ndarray:
        made.append(args)
        if len(made) > TENSORS // 2:
            raise MemoryError
        return empty(*args)  # type: ignore[call-overload, no-any-return]

    cache.bound = object()
    monkeypatch.setattr(deploy.slab_cache.np, "empty", scarce)
    with pytest.raises(MemoryError):
        cache.reserve(COLUMNS + 1)
    monkeypatch.undo()
    assert cache.bound is None
    assert_equal(cache, expected)
    cache.reserve(COLUMNS + 1)
    assert {slab.shape[2] for slab in cache.slabs} == {2 * COLUMNS}
    assert_equal(cache, expected)
