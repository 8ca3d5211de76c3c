"""ONNX to engine with TensorRT 10, 11 or TensorRT-RTX; what a release lacks is skipped by hasattr.

Networks are strongly typed in every release: precision is what the ONNX tensors say. Standard
library only: a build kit carries this file, and the device runs the code that is tested here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from export.trt_api import PRODUCT, BuildError, Flavour, Network, Tensor, TensorRt, quiet_logger
from export.trt_progress import OnProgress, in_worker, progress_monitor

Shape = Sequence[int]
Profile = Mapping[str, Mapping[str, Shape]]  # input name -> "min" | "opt" | "max" -> shape

FIRST_RELEASE = {  # of TensorRT's parser; from the change log of onnx-tensorrt
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
}


INTEGERS = ("int8", "int4")


def first_release(operators: Iterable[str]) -> tuple[int, int]:
    """The first TensorRT whose parser knows all of a graph's operators, as far as we know."""
    return max([(10, 0), *(FIRST_RELEASE[op] for op in operators if op in FIRST_RELEASE)])


def release_of(trt: TensorRt) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in trt.__version__.split(".")[:2])


def allows_tf32(precision: str) -> bool:
    """Whether fp32 products may round their inputs: next to int8 and int4 weights it is small."""
    return precision in INTEGERS


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    `targets` (such as "sm86") are compiled ahead of time, TensorRT-RTX only; empty: the GPU here.
    `tf32` lets fp32 products round their inputs to 10 bits of mantissa. `timing_cache` is read and
    written where the release makes use of one (not TensorRT-RTX).
    """

    flavour: Flavour
    profiles: Mapping[str, Profile]
    targets: tuple[str, ...] = ()
    workspace_bytes: int = 2**30
    tf32: bool = False
    timing_cache: Path | None = None


@dataclass
class Built:
    """A serialised engine (an object with the buffer protocol) and what it was built from."""

    engine: Any
    seconds: float
    version: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    layers: list[dict[str, Any]] = field(repr=False)


def engine_from_onnx(
    trt: TensorRt,
    onnx_bytes: bytes,
    onnx_path: Path,
    settings: BuildSettings,
    on_progress: OnProgress,
) -> Built:
    """Build an engine from a model whose external data lie beside `onnx_path`.

    A keyboard interrupt cancels the build and goes on to the caller.
    Raises: BuildError when the parser rejects a node (the first one is named) or the build fails.
    """

    def work(cancelled: threading.Event) -> Built:
        return _built(trt, onnx_bytes, onnx_path, settings, on_progress, cancelled)

    return in_worker(work)


def _built(
    trt: TensorRt,
    onnx_bytes: bytes,
    onnx_path: Path,
    settings: BuildSettings,
    on_progress: OnProgress,
    cancelled: threading.Event,
) -> Built:
    start_s = time.monotonic()
    logger = quiet_logger(trt)
    builder = _builder(trt, settings.flavour, logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes, str(onnx_path)):
        raise BuildError(_parser_line(trt, settings.flavour, parser, onnx_path))
    _let_attention_decompose(trt, network)
    inputs = [_described(network.get_input(i)) for i in range(network.num_inputs)]
    outputs = [_described(network.get_output(i)) for i in range(network.num_outputs)]
    layers = described_layers(network)
    config = _config(trt, builder, network, settings)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = progress_monitor(trt, on_progress, cancelled)
    engine = None if cancelled.is_set() else builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(
            f"{PRODUCT[settings.flavour]} {trt.__version__} could not build {onnx_path.name}: "
            f"{_first(logger.errors) or 'it gave no reason'}; needs a graph, limits and targets "
            "that it supports; try another --precision or --target, or smaller --max-batch, "
            "--max-seq and --max-past"
        )
    _save_timing_cache(config, settings)
    return Built(engine, time.monotonic() - start_s, trt.__version__, inputs, outputs, layers)


def described_layers(network: Network) -> list[dict[str, Any]]:
    """Name, type and outputs of every layer: an engine cannot be inspected without its GPU."""
    layers = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "outputs": [[_dtype(t), _shape(t)] for t in outputs if t is not None],
            }
        )
    return layers


def _builder(trt: TensorRt, flavour: Flavour, logger: Any) -> Any:
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        builder, reason = None, str(error)
    else:
        reason = _first(logger.errors)
    if builder is None or not builder:
        raise BuildError(
            f"{PRODUCT[flavour]} {trt.__version__} cannot start a builder ({reason}); needs an "
            "NVIDIA GPU with its driver; without one name --target, which TensorRT-RTX builds"
        )
    return builder


def _network_flags(trt: TensorRt) -> int:
    """Strongly typed: the default and only kind from TensorRT 11 on, a flag before."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def _let_attention_decompose(trt: TensorRt, network: Network) -> None:
    """Where no fused kernel fits (fp32 has none), TensorRT may split attention into plain layers.

    Python sees every layer as ILayer; assigning its class is TensorRT's own way to the rest.
    """
    boundary = getattr(trt, "IAttentionInputLayer", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if boundary is not None and layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = boundary
            cast(Any, layer).attention.decomposable = True


def _config(trt: TensorRt, builder: Any, network: Network, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if hasattr(trt.BuilderFlag, "TF32") and not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for name, shapes in settings.profiles.items():
        _add_profile(builder, config, network, name, shapes)
    if settings.targets:
        _set_targets(trt, config, settings)
    if _keeps_timings(config, settings):
        path = settings.timing_cache
        known = path.read_bytes() if path is not None and path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _add_profile(
    builder: Any, config: Any, network: Network, name: str, shapes_of: Profile
) -> None:
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shapes = shapes_of.get(tensor.name)
        if shapes is None:
            raise BuildError(
                f"profile {name} has no shapes for the input {tensor.name}; needs one of "
                f"{', '.join(shapes_of)}; export the model again"
            )
        # A shape tensor's profile holds values, every other input's holds its dimensions.
        add = profile.set_shape_input if tensor.is_shape_tensor else profile.set_shape
        add(tensor.name, *(list(shapes[end]) for end in ("min", "opt", "max")))
    if not profile or config.add_optimization_profile(profile) < 0:
        raise BuildError(
            f"profile {name} does not fit the network's inputs; needs min ≤ opt ≤ max for each; "
            "choose other --max-batch, --max-seq and --max-past"
        )


def _set_targets(trt: TensorRt, config: Any, settings: BuildSettings) -> None:
    """Compile for GPUs that are not here: `num_compute_capabilities` exists in TensorRT-RTX."""
    capabilities = getattr(trt, "ComputeCapability", None)
    missing = [t for t in settings.targets if not hasattr(capabilities, t.upper())]
    if missing or not hasattr(config, "num_compute_capabilities"):
        raise BuildError(
            f"{PRODUCT[settings.flavour]} {trt.__version__} cannot build ahead of time for "
            f"{','.join(missing or settings.targets)}; needs TensorRT-RTX 1.7 or newer; "
            "install it with: pip install -c constraints.txt -e '.[rtx]'"
        )
    config.num_compute_capabilities = len(settings.targets)
    for index, target in enumerate(settings.targets):
        config.set_compute_capability(getattr(capabilities, target.upper()), index)


def _keeps_timings(config: Any, settings: BuildSettings) -> bool:
    """TensorRT-RTX has the calls, but they do nothing and may look for a GPU."""
    return settings.flavour == "tensorrt" and hasattr(config, "create_timing_cache")


def _save_timing_cache(config: Any, settings: BuildSettings) -> None:
    if settings.timing_cache is None or not _keeps_timings(config, settings):
        return
    cache = config.get_timing_cache()
    if cache is not None:
        partial = settings.timing_cache.with_name(settings.timing_cache.name + ".partial")
        partial.write_bytes(bytes(cache.serialize()))
        partial.replace(settings.timing_cache)


def _parser_line(trt: TensorRt, flavour: Flavour, parser: Any, path: Path) -> str:
    product = f"{PRODUCT[flavour]} {trt.__version__}"
    remedy = "needs a finished ONNX of the standard flavour; export it again with --overwrite"
    if parser.num_errors == 0:
        return f"{product} cannot read {path.name}; {remedy}"
    error = parser.get_error(0)
    where = ""
    if error.node() >= 0 and error.node_operator():
        where = f" at node {error.node()} {error.node_name()} ({error.node_operator()})"
        first = FIRST_RELEASE.get(error.node_operator())
        if flavour == "tensorrt" and first is not None and release_of(trt) < first:
            remedy = f"needs TensorRT {first[0]}.{first[1]} or newer for this operator; update it"
    reason = " ".join(error.desc().split()) or "no reason given"
    return f"{product} rejects {path.name}{where}: {reason}; {remedy}"


def _described(tensor: Tensor) -> dict[str, Any]:
    """`memory` says where a runtime must put it: shape tensors are read on the host."""
    memory = "host" if tensor.is_shape_tensor else "device"
    names = {"name": tensor.name, "dtype": _dtype(tensor), "shape": _shape(tensor)}
    return {**names, "memory": memory}


def _dtype(tensor: Tensor) -> str:
    """TensorRT's name in the words of the rest of the project."""
    words = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16"}
    name = str(tensor.dtype).rsplit(".", 1)[-1]
    return words.get(name, name.lower())


def _shape(tensor: Tensor) -> list[int] | None:
    """None where TensorRT knows the number of dimensions only at run time."""
    try:
        return [int(size) for size in tensor.shape]
    except ValueError:
        return None


def _first(errors: Sequence[str]) -> str:
    return errors[0] if errors else ""
