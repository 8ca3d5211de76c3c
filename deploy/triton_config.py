"""Triton's model configuration as text, from the inputs and outputs of a graph or an engine.

Schema: ModelConfig in model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.artifact import UserError, read_json
from export.session import IN_PLACE

REMEDY = "export the student again with: python -m export --run RUN --overwrite"
TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """`dims`: sizes with the batch first; -1 is any. `is_shape`: TensorRT reads it on the host."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    is_shape: bool = False


@dataclass(frozen=True)
class Settings:
    """`max_batch`: 0 for a model that Triton must not batch. `kind`: cpu | gpu.

    `accelerate`: run an ONNX through ONNX Runtime's TensorRT provider.
    """

    name: str
    max_batch: int
    max_delay_us: int
    instances: int
    kind: str
    accelerate: bool = False
    threads: int | None = None


def tensors_of_onnx(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a graph. An input with a default, `logits_to_keep`, is left out:
    Triton knows no optional inputs of ONNX Runtime, so every position gets its logits.

    Raises: UserError when the file cannot be read.
    """
    graph, onnx = _load(path).graph, _onnx()
    defaults = {initializer.name for initializer in graph.initializer}
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    words = {"float": "float32"}

    def read(value: Any) -> Tensor:
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        name = names[tensor.elem_type]
        return Tensor(value.name, _data_type(words.get(name, name), value.name), dims)

    inputs = [read(value) for value in graph.input if value.name not in defaults]
    return inputs, [read(value) for value in graph.output]


def appends_in_place(path: Path) -> bool:
    """Whether a graph may have past and present in one buffer, for ONNX Runtime's CPU alone.

    Raises: UserError when the file cannot be read.
    """
    return any(entry.key == IN_PLACE for entry in _load(path).metadata_props)


def tensors_of_engine(directory: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a TensorRT engine, as build.json records them.

    Raises: UserError when a tensor's type has no name in Triton.
    """
    record = read_json(directory / "build.json")

    def read(entry: Mapping[str, Any]) -> Tensor:
        kind = _data_type(str(entry["dtype"]), str(entry["name"]))
        is_shape = entry.get("memory") == "host"
        return Tensor(str(entry["name"]), kind, tuple(entry["shape"] or ()), is_shape)

    return [read(entry) for entry in record["inputs"]], [read(e) for e in record["outputs"]]


def onnx_config(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], settings: Settings
) -> dict[str, Any]:
    """ModelConfig for the ONNX Runtime backend, as nested dictionaries."""
    config = _common("onnxruntime", "model.onnx", inputs, outputs, settings)
    if settings.accelerate:
        config["optimization"] = {
            "execution_accelerators": {"gpu_execution_accelerator": [{"name": "tensorrt"}]}
        }
    if settings.threads is not None:
        config["parameters"] = [
            {
                "key": "intra_op_thread_count",
                "value": {"string_value": str(settings.threads)},
            }
        ]
    return config


def engine_config(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    profiles: Sequence[str],
    settings: Settings,
) -> dict[str, Any]:
    """ModelConfig for the TensorRT backend; every instance serves all optimisation profiles."""
    config = _common("tensorrt", "model.plan", inputs, outputs, settings)
    config["instance_group"][0]["profile"] = [str(i) for i in range(len(profiles))]
    return config


def written(message: Mapping[str, Any]) -> str:
    """Protobuf text format, one field a line; lists repeat the field."""
    return "\n".join(_lines(message, "")) + "\n"


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise UserError(
            "onnx is not installed; needs it to read the graph's inputs; pip install onnx"
        ) from None
    return onnx


def _load(path: Path) -> Any:
    """onnx.ModelProto without its weights."""
    onnx = _onnx()
    try:
        return onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise several kinds
        raise UserError(f"{path} cannot be read ({error}); needs an ONNX; {REMEDY}") from None


def _common(
    backend: str,
    file: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    settings: Settings,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": settings.name,
        "backend": backend,
        "default_model_filename": file,
        "max_batch_size": settings.max_batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [_field(tensor, settings) for tensor in inputs],
        "output": [_field(tensor, settings) for tensor in outputs],
        "instance_group": [{"count": settings.instances, "kind": f"KIND_{settings.kind.upper()}"}],
    }
    if settings.max_batch:
        sizes = [size for size in (2, 4, 8, 16, 32, 64) if size < settings.max_batch]
        config["dynamic_batching"] = {
            "preferred_batch_size": [*sizes[-2:], settings.max_batch],
            "max_queue_delay_microseconds": settings.max_delay_us,
        }
    return config


def _field(tensor: Tensor, settings: Settings) -> dict[str, Any]:
    """Without the batch where Triton batches; it adds that dimension itself."""
    dims = tensor.dims[1:] if settings.max_batch else tensor.dims
    field: dict[str, Any] = {
        "name": tensor.name,
        "data_type": tensor.data_type,
        "dims": list(dims),
    }
    if tensor.is_shape:
        field["is_shape_tensor"] = True
    return field


def _data_type(name: str, tensor: str) -> str:
    if name not in TYPES:
        raise UserError(f"{tensor} has the type {name}; Triton takes {', '.join(TYPES)}; {REMEDY}")
    return TYPES[name]


def _lines(message: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines += [f"{indent}{key} {{", *_lines(item, indent + "  "), f"{indent}}}"]
            else:
                lines.append(f"{indent}{key}: {_scalar(key, item)}")
    return lines


def _scalar(key: str, value: Any) -> str:
    """Enumerations (kinds and data types) go without quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if key in ("kind", "data_type") or not isinstance(value, str):
        return str(value)
    return json.dumps(value)
