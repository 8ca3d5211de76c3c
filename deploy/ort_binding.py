"""IO binding: the cache stays on the device between steps; ids go there, logits come back.

Operations on the cache (rows, padding) go through host memory: they are rare beside steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.host_cache import HostCache
from export.session import KEEP, OrtModel


class BoundCache:
    """See `deploy.runner.Cache`. `values`: onnxruntime.OrtValue each, [B, H, T, D]."""

    def __init__(self, values: Sequence[Any], device: str) -> None:
        self.values = list(values)
        self._device = device

    @classmethod
    def from_host(cls, cache: HostCache, device: str) -> BoundCache:
        return cls([_on_device(value, device) for value in cache.values], device)

    @property
    def batch(self) -> int:
        return int(self.values[0].shape()[0])

    @property
    def length(self) -> int:
        return int(self.values[0].shape()[2])

    def to_host(self) -> HostCache:
        return HostCache([value.numpy() for value in self.values])

    def select(self, rows: Sequence[int]) -> BoundCache:
        return self._moved(self.to_host().select(rows))

    def compact(self, rows: Sequence[int], columns: int) -> BoundCache:
        return self._moved(self.to_host().compact(rows, columns))

    def extend(self, other: BoundCache) -> BoundCache:
        return self.concat(other)

    def concat(self, other: BoundCache) -> BoundCache:
        return self._moved(self.to_host().concat(other.to_host()))

    def replace(self, rows: Sequence[int], other: BoundCache) -> None:
        host = self.to_host()
        host.replace(rows, other.to_host())
        self.values = self._moved(host).values

    def pad_left(self, columns: int) -> BoundCache:
        return self._moved(self.to_host().pad_left(columns))

    def shift(self, columns: int) -> BoundCache:
        return self.pad_left(columns)

    def trim_left(self, columns: int) -> BoundCache:
        return self._moved(self.to_host().trim_left(columns))

    def truncate(self, length: int) -> BoundCache:
        return self._moved(self.to_host().truncate(length))

    def _moved(self, cache: HostCache) -> BoundCache:
        return BoundCache.from_host(cache, self._device)


class BoundStep:
    """Forward passes with the cache on `device` ("cuda"; "cpu" for tests).

    IO binding cannot set `logits_to_keep`, an input with a default. A step of one token has one
    position with logits anyway; a prompt is run without binding, so that the head is computed for
    its last position only, and its cache is then moved to the device once.
    """

    def __init__(self, model: OrtModel, device: str) -> None:
        self._model = model
        self._device = device

    def new_cache(self, batch: int) -> BoundCache:
        return BoundCache.from_host(HostCache(self._model.empty_cache(batch)), self._device)

    def step(
        self,
        input_ids_BS: np.ndarray,
        cache: BoundCache,
        attention_mask_BT: np.ndarray,
        position_ids_BS: np.ndarray,
        logits_to_keep: int | None,
    ) -> np.ndarray:
        """Append to `cache` in place; returns float32 logits [B, K, V]."""
        small = {
            "input_ids": input_ids_BS,
            "attention_mask": attention_mask_BT,
            "position_ids": position_ids_BS,
        }
        new = input_ids_BS.shape[1]
        keeps_all = logits_to_keep is None or logits_to_keep >= new
        if keeps_all or not self._model.has_logits_to_keep:
            logits, values = self._run_bound(small, cache)
        else:
            small[KEEP] = np.array([logits_to_keep])
            logits, values = self._run_unbound(small, cache)
        cache.values = values
        logits_BKV = logits.numpy()[:, -(logits_to_keep or new) :]
        return logits_BKV.astype(np.float32, copy=False)

    def _run_bound(self, small: dict[str, np.ndarray], cache: BoundCache) -> tuple[Any, list[Any]]:
        """A fresh binding each time: the values of a binding are overwritten by its next run."""
        model = self._model
        binding = model.session.io_binding()
        for name, array in small.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        for name, value in zip(model.cache_inputs, cache.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in model.outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        model.session.run_with_iobinding(binding)
        logits, *values = binding.get_outputs()
        binding.clear_binding_inputs()  # or the outputs would keep the shorter cache alive
        return logits, values

    def _run_unbound(
        self, small: dict[str, np.ndarray], cache: BoundCache
    ) -> tuple[Any, list[Any]]:
        model = self._model
        feed = {name: _on_device(array.astype(np.int64), "cpu") for name, array in small.items()}
        feed.update(zip(model.cache_inputs, cache.values, strict=True))
        logits, *present = model.session.run_with_ort_values(model.outputs, feed)
        if self._device == "cpu":
            return logits, present
        return logits, [_on_device(value.numpy(), self._device) for value in present]


def _on_device(array: np.ndarray, device: str) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
