"""Steps of ONNX Runtime's CPU that append to the cache in place.

For engines whose graph says so (`export.graph_inplace`): past and present are one buffer with more
columns than are in use. Shapes: B batch, S new positions, T columns in use, K positions with
logits, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deploy.slab_cache import SlabCache
from export.session import KEEP, OrtModel


class InPlaceStep:
    """Forward passes of one engine over `SlabCache`s."""

    def __init__(self, model: OrtModel) -> None:
        self._model = model
        self._present = [name for name in model.outputs if name != "logits"]

    def new_cache(self, batch: int) -> SlabCache:
        m = self._model
        return SlabCache.empty(len(m.cache_inputs), batch, m.kv_heads, m.head_dim, m.float_type)

    def step(
        self,
        input_ids_BS: np.ndarray,
        cache: SlabCache,
        attention_mask_BT: np.ndarray,
        position_ids_BS: np.ndarray,
        logits_to_keep: int | None,
    ) -> np.ndarray:
        """Append to `cache`; returns float32 logits [B, K, V], overwritten by its next step."""
        new = input_ids_BS.shape[1]
        cache.reserve(cache.length + new)
        small = {
            "input_ids": np.ascontiguousarray(input_ids_BS, np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask_BT, np.int64),
            "position_ids": np.ascontiguousarray(position_ids_BS, np.int64),
        }
        if new == 1:
            logits_BKV = self._decode(small, cache)
        else:
            logits_BKV = self._prompt(small, cache, logits_to_keep)
        cache.length += new
        kept = logits_BKV if logits_to_keep is None else logits_BKV[:, -logits_to_keep:]
        return kept.astype(np.float32, copy=False)

    def _decode(self, small: dict[str, np.ndarray], cache: SlabCache) -> np.ndarray:
        """One position: everything but the small inputs stays bound from step to step."""
        if cache.bound is None:
            cache.bound = self._bind(cache)
        binding, logits_B1V = cache.bound
        for name, array in small.items():
            binding.bind_cpu_input(name, array)
        self._model.session.run_with_iobinding(binding)
        found: np.ndarray = logits_B1V
        return found

    def _bind(self, cache: SlabCache) -> tuple[Any, np.ndarray]:
        m = self._model
        binding = m.session.io_binding()
        logits_B1V = np.empty((cache.batch, 1, m.vocabulary), m.float_type)
        _bind_output(binding, "logits", logits_B1V)
        names = zip(m.cache_inputs, self._present, cache.views(), strict=True)
        for past, present, view in names:
            pointer = view.ctypes.data
            binding.bind_input(past, "cpu", 0, view.dtype, view.shape, pointer)
            _bind_output(binding, present, view)
        return binding, logits_B1V

    def _prompt(
        self, small: dict[str, np.ndarray], cache: SlabCache, logits_to_keep: int | None
    ) -> np.ndarray:
        """Many positions. IO binding cannot set `logits_to_keep`, an input with a default; a vector
        of values can."""
        from onnxruntime import OrtDevice, RunOptions

        m = self._model
        batch, kept = small["input_ids"].shape
        if m.has_logits_to_keep and logits_to_keep is not None:
            kept = min(kept, logits_to_keep)
            small[KEEP] = np.array([kept])
        logits_BKV = np.empty((batch, kept, m.vocabulary), m.float_type)
        values = dict(zip(m.cache_inputs, cache.views(), strict=True))
        feeds, fetches = {**small, **values}, [logits_BKV, *values.values()]
        outputs = ["logits", *self._present]
        device = OrtDevice.make("cpu", 0)._get_c_device()
        m.session.run_with_ortvaluevector(
            RunOptions(),
            list(feeds),
            _vector(feeds.values()),
            outputs,
            _vector(fetches),
            [device] * len(outputs),
        )
        return logits_BKV


def _bind_output(binding: Any, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _vector(arrays: Any) -> Any:
    """ONNX Runtime's values over these arrays' own memory."""
    from onnxruntime import OrtValue
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    vector = OrtValueVector()
    for array in arrays:
        vector.push_back(OrtValue.ortvalue_from_numpy(array)._ortvalue)
    return vector
