"""A model of one matmul as ONNX bytes, written without the onnx package (which devices lack).

Field numbers are those of onnx.proto3, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "float16": 10}
IR_VERSION, OPSET = 8, 17
INT_ATTRIBUTE = 2


def matmul_model(
    operator: str,
    input_type: str,
    input_shape: tuple[int, int],
    output: tuple[str, tuple[int, int]],
    constants: Mapping[str, np.ndarray],
    *,
    domain: str = "",
    attributes: Mapping[str, int] | None = None,
) -> bytes:
    """A serialised model: output "y" = operator(input "x", constants in order).

    `input_type` and the first of `output` are names in ELEMENT_TYPES; the second is its shape.
    """
    node = _text(1, "x") + b"".join(_text(1, name) for name in constants)
    node += _text(2, "y") + _text(4, operator) + _text(7, domain)
    node += b"".join(_bytes(5, _attribute(*pair)) for pair in (attributes or {}).items())
    graph = _bytes(1, node) + _text(2, "matmul")
    graph += b"".join(_bytes(5, _tensor(*pair)) for pair in constants.items())
    graph += _bytes(11, _value("x", input_type, input_shape))
    graph += _bytes(12, _value("y", *output))
    model = _number(1, IR_VERSION) + _bytes(7, graph)
    model += _bytes(8, _text(1, "") + _number(2, OPSET))
    return model + (_bytes(8, _text(1, domain) + _number(2, 1)) if domain else b"")


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    kind = _number(2, ELEMENT_TYPES[array.dtype.name])
    return dims + kind + _text(8, name) + _bytes(9, np.ascontiguousarray(array).tobytes())


def _value(name: str, element_type: str, shape: tuple[int, int]) -> bytes:
    dims = b"".join(_bytes(1, _number(1, size)) for size in shape)
    tensor = _number(1, ELEMENT_TYPES[element_type]) + _bytes(2, dims)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _attribute(name: str, value: int) -> bytes:
    return _text(1, name) + _number(3, value) + _number(20, INT_ATTRIBUTE)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
