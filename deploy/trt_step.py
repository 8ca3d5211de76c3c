"""One pass of a TensorRT engine: tensors bound, queued, and for decoding replayed as a CUDA graph.

Shapes: B batch, S new columns, P cached columns, K positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.cuda import Cuda
from deploy.trt_cache import Block, TrtCache

NUMPY_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # its bits
    "int64": np.int64,
    "int32": np.int32,
}
KEEP = "logits_to_keep"
DECODE_COLUMNS = 64  # decode steps that share one shape and one CUDA graph


class TrtStep:
    """The two execution contexts of an engine, one a profile, and their buffers."""

    def __init__(
        self, contexts: Mapping[str, Any], record: Mapping[str, Any], cuda: Cuda, vocabulary: int
    ) -> None:
        self._contexts, self._cuda, self._vocabulary = contexts, cuda, vocabulary
        self.stream = cuda.new_stream()
        for index, name in enumerate(record["profiles"]):
            contexts[name].set_optimization_profile_async(index, self.stream)
        cuda.synchronise(self.stream)
        described = [*record["inputs"], *record["outputs"]]
        self._types = {tensor["name"]: NUMPY_TYPES[tensor["dtype"]] for tensor in described}
        self._keeps_input = any(tensor["name"] == KEEP for tensor in record["inputs"])
        self._gives_all = record["logits"] == "all"
        self._max_past = int(record["limits"]["max_past"])
        self._buffers: dict[str, Block] = {}
        self._keep = np.ones(1, np.int64)  # read on the host while a pass is queued
        self._scratch: Block | None = None
        self._graph: Any = None
        self._graph_key: tuple[Any, ...] = ()

    def prefill(
        self,
        ids_BS: np.ndarray,
        cache: TrtCache,
        mask_BT: np.ndarray,
        positions_BS: np.ndarray,
        keep: int,
    ) -> np.ndarray:
        """Append to `cache`; returns float32 logits [B, keep, V]."""
        if cache.spare:
            cache.widen(cache.length)
        batch, new = ids_BS.shape
        total = cache.columns + new
        layout = cache.layout
        present = Block(self._cuda, layout.tensors, layout.size_bytes(batch, total))
        kept = new if self._gives_all else keep
        self._keep[0] = kept
        self._upload(ids_BS, mask_BT, positions_BS)
        context = self._contexts["prefill"]
        self._bind(context, (batch, new), cache, present, kept)
        self._execute(context)
        logits_BKV = self._logits(batch, kept)
        cache.adopt(present, total)
        return logits_BKV[:, -keep:]

    def decode(
        self, ids_B1: np.ndarray, cache: TrtCache, mask_BT: np.ndarray, positions_B1: np.ndarray
    ) -> np.ndarray:
        """Append one column to `cache` in its place; returns float32 logits [B, 1, V]."""
        if not cache.spare:
            wider = (cache.columns // DECODE_COLUMNS + 1) * DECODE_COLUMNS
            cache.widen(min(wider, self._max_past))
        padding = np.zeros((cache.batch, cache.spare), mask_BT.dtype)
        self._keep[0] = 1
        self._upload(ids_B1, np.concatenate([padding, mask_BT], axis=1), positions_B1)
        present = self._scratch_for(cache)
        self._logits_buffer(cache.batch, 1)
        key = (cache.batch, cache.columns, cache.block.base, present.base, *self._addresses())
        if key != self._graph_key:
            self._capture(cache, present)
            self._graph_key = key
        self._cuda.launch(self._graph, self.stream)
        cache.spare -= 1
        return self._logits(cache.batch, 1)

    def _capture(self, cache: TrtCache, present: Block) -> None:
        """Record a pass and the move of its result into the cache, one column to the left.

        A pass before it settles what TensorRT defers to the first one of a shape. Only the graph
        recorded last may be launched: another use of the context would change it.
        """
        context = self._contexts["decode"]
        self._bind(context, (cache.batch, 1), cache, present, 1)
        self._execute(context)
        self._cuda.synchronise(self.stream)
        self._cuda.begin_capture(self.stream)
        self._execute(context)
        entry, columns = cache.layout.entry_bytes, cache.columns
        for target, source in zip(cache.block.pointers, present.pointers, strict=True):
            self._cuda.copy_rows(
                target,
                columns * entry,
                source + entry,
                (columns + 1) * entry,
                columns * entry,
                cache.batch * cache.layout.heads,
                self.stream,
            )
        self._graph = self._cuda.end_capture(self.stream)

    def _bind(
        self, context: Any, shape: tuple[int, int], cache: TrtCache, present: Block, kept: int
    ) -> None:
        batch, new = shape
        heads, size = cache.layout.heads, cache.layout.head_dim
        shapes = {
            "input_ids": (batch, new),
            "attention_mask": (batch, cache.columns + new),
            "position_ids": (batch, new),
        }
        for name, dimensions in shapes.items():
            context.set_input_shape(name, dimensions)
            context.set_tensor_address(name, self._buffers[name].base)
        if self._keeps_input:
            context.set_tensor_address(KEEP, self._keep.ctypes.data)
        for index in range(cache.layout.tensors):
            layer, part = index // 2, ("key", "value")[index % 2]
            past = f"past_key_values.{layer}.{part}"
            context.set_input_shape(past, (batch, heads, cache.columns, size))
            context.set_tensor_address(past, cache.block.pointers[index])
            context.set_tensor_address(f"present.{layer}.{part}", present.pointers[index])
        self._logits_buffer(batch, kept)
        context.set_tensor_address("logits", self._buffers["logits"].base)

    def _upload(self, ids_BS: np.ndarray, mask_BT: np.ndarray, positions_BS: np.ndarray) -> None:
        arrays = {"input_ids": ids_BS, "attention_mask": mask_BT, "position_ids": positions_BS}
        for name, array in arrays.items():
            exact = np.ascontiguousarray(array, dtype=self._types[name])
            self._cuda.upload(self._buffer(name, exact.nbytes).base, exact, self.stream)

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream):
            raise RuntimeError("TensorRT could not queue a pass; its log says why")

    def _logits(self, batch: int, kept: int) -> np.ndarray:
        array = np.empty((batch, kept, self._vocabulary), self._types["logits"])
        self._cuda.download(array, self._buffers["logits"].base, self.stream)
        self._cuda.synchronise(self.stream)
        if array.dtype == np.uint16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False)

    def _logits_buffer(self, batch: int, kept: int) -> Block:
        itemsize = np.dtype(self._types["logits"]).itemsize
        return self._buffer("logits", batch * kept * self._vocabulary * itemsize)

    def _buffer(self, name: str, size_bytes: int) -> Block:
        """This tensor's buffer, replaced by a larger one when it is too small."""
        found = self._buffers.get(name)
        if found is None or found.size_bytes < size_bytes:
            found = self._buffers[name] = Block(self._cuda, 1, size_bytes)
        return found

    def _scratch_for(self, cache: TrtCache) -> Block:
        """Where a decode step writes keys and values before they move into the cache."""
        size_bytes = cache.layout.size_bytes(cache.batch, cache.columns + 1)
        if self._scratch is None or self._scratch.size_bytes < size_bytes:
            self._scratch = Block(self._cuda, cache.layout.tensors, size_bytes)
        return self._scratch

    def _addresses(self) -> Sequence[int]:
        return [block.base for block in self._buffers.values()]
