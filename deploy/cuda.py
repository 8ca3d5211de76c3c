"""The few calls of the CUDA runtime that the TensorRT runner makes, through cuda-python.

Pointers are addresses as int. Every call is queued on a stream; never run on hardware by us.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from distill.commit import UserError


class Cuda(Protocol):
    """What the runner needs; `CudaRuntime` has it, and so has the fake of the tests."""

    def allocate(self, size_bytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def new_stream(self) -> int: ...

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None: ...

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None: ...

    def clear(self, pointer: int, size_bytes: int, stream: int) -> None: ...

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        """Copy `rows` rows of `width` bytes on the device; a pitch is the bytes between rows."""
        ...

    def synchronise(self, stream: int) -> None: ...

    def begin_capture(self, stream: int) -> None: ...

    def end_capture(self, stream: int) -> Any:
        """A graph of all that was queued since `begin_capture`, ready to launch."""
        ...

    def launch(self, graph: Any, stream: int) -> None: ...


class CudaRuntime:
    """cudart of cuda-python 12 or 13. Raises: RuntimeError with CUDA's own words."""

    def __init__(self) -> None:
        self._api = _load()

    def allocate(self, size_bytes: int) -> int:
        return int(self._called("cudaMalloc", size_bytes))

    def free(self, pointer: int) -> None:
        self._called("cudaFree", pointer)

    def new_stream(self) -> int:
        return int(self._called("cudaStreamCreate"))

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._called("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._called("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, stream)

    def clear(self, pointer: int, size_bytes: int, stream: int) -> None:
        self._called("cudaMemsetAsync", pointer, 0, size_bytes, stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        sizes = (target, target_pitch, source, source_pitch, width, rows)
        self._called("cudaMemcpy2DAsync", *sizes, kind, stream)

    def synchronise(self, stream: int) -> None:
        self._called("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._called("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        graph = self._called("cudaStreamEndCapture", stream)
        return self._called("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any, stream: int) -> None:
        self._called("cudaGraphLaunch", graph, stream)

    def _called(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            reason = self._api.cudaGetErrorString(status)[1]
            words = reason.decode() if isinstance(reason, bytes) else reason
            raise RuntimeError(f"{name} failed: {words}")
        return results[0] if results else None


def _load() -> Any:
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError(
        "cuda-python cannot be imported; needs it to run TensorRT engines; "
        "install it with: pip install cuda-python"
    )
