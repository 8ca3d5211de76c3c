"""A stand-in for the module `tensorrt`, for the code paths that need a GPU; it builds nothing real.

Two releases: 10 (strongly typed by a flag) and 11 (always strongly typed). Neither has the calls
for compute capabilities, which belong to TensorRT-RTX.
"""

from __future__ import annotations

import enum
import time
from types import SimpleNamespace
from typing import Any

import onnx

ENGINE_BYTES = b"an engine"
NETWORK_FLAG = 1


class Flag(enum.IntEnum):
    STRONGLY_TYPED = NETWORK_FLAG


class Logger:
    INTERNAL_ERROR, ERROR = 0, 1

    def __init__(self) -> None:
        pass


class ProgressMonitor:
    def __init__(self) -> None:
        pass


class Memory(bytes):
    """What `serialize` and `build_serialized_network` return."""


class Cache:
    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> Memory:
        return Memory(self.known + b"+timed")


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[list[int], ...]] = {}
        self.values: dict[str, tuple[list[int], ...]] = {}

    def set_shape(self, name: str, *ends: list[int]) -> None:
        self.shapes[name] = ends

    def set_shape_input(self, name: str, *ends: list[int]) -> None:
        self.values[name] = ends


class Config:
    def __init__(self) -> None:
        self.progress_monitor: Any = None
        self.profiles: list[Profile] = []
        self.pools: dict[str, int] = {}
        self.cache: Cache | None = None
        self.cleared: list[str] = []

    def set_memory_pool_limit(self, pool: str, size_bytes: int) -> None:
        self.pools[pool] = size_bytes

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, known: bytes) -> Cache:
        return Cache(known)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def _tensor(name: str) -> Any:
    return SimpleNamespace(
        name=name, shape=(1,), dtype="DataType.INT64", is_shape_tensor=name == "logits_to_keep"
    )


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.inputs = flags, []
        self.num_inputs, self.num_outputs, self.num_layers = 0, 1, 1

    def read(self, model: onnx.ModelProto) -> None:
        constants = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in constants]
        self.num_inputs = len(self.inputs)

    def get_input(self, index: int) -> Any:
        return _tensor(self.inputs[index])

    def get_output(self, index: int) -> Any:
        return _tensor("logits")

    def get_layer(self, index: int) -> Any:
        kind = SimpleNamespace(name="MATRIX_MULTIPLY")
        return SimpleNamespace(name="head", type=kind, num_outputs=1, get_output=self.get_output)


class FakeTensorRt:
    """`module = FakeTensorRt("10.13.0")`; `module.config` and `.network` show what was asked."""

    ILogger = Logger
    BuilderFlag = SimpleNamespace(TF32="TF32")
    MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")

    def __init__(
        self, version: str, *, gpu: bool = True, fails: bool = False, hangs: bool = False
    ) -> None:
        self.__version__ = version
        self.config, self.network = Config(), Network(0)
        self._gpu, self._fails, self._hangs = gpu, fails, hangs
        self.NetworkDefinitionCreationFlag = Flag if version.startswith("10.") else object()
        if not version.startswith("9."):
            self.IProgressMonitor = ProgressMonitor

    def Builder(self, logger: Any) -> Any:
        if not self._gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(
            create_network=self._create_network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=Profile,
            build_serialized_network=lambda network, config: self._build(logger, config),
        )

    def OnnxParser(self, network: Network, logger: Any) -> Any:
        def parse(data: bytes, path: str) -> bool:
            network.read(onnx.load_model_from_string(data))
            return True

        return SimpleNamespace(parse=parse, num_errors=0)

    def _create_network(self, flags: int) -> Network:
        self.network = Network(flags)
        return self.network

    def _build(self, logger: Any, config: Config) -> Memory | None:
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            go_on = monitor.step_complete("Building engine", 0)
            while self._hangs and go_on:
                time.sleep(0.01)
                go_on = monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
            if not go_on:
                return None
        if self._fails:
            logger.log(1, "no tactic\nfits")
            return None
        return Memory(ENGINE_BYTES)
