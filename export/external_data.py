"""Which files an ONNX model names for its weights, read before any runtime opens them.

A bare device has neither `onnx` nor protobuf, so this walks protobuf's wire format itself: a
message is a row of (field number, wire type, value), of which only the fields on the way to
TensorProto.external_data are entered. Weights inside the file are skipped, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from distill.commit import UserError

REMEDY = "write the directory again with: python -m export --run RUN --overwrite"

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
TENSOR = "tensor"
# message -> {field number: message below it}; the names are those of onnx.proto
FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: TENSOR, 2: TENSOR},
}
EXTERNAL_DATA = 13
KEY, VALUE = 1, 2


def external_data_files(model_path: Path) -> tuple[Path, ...]:
    """The files beside `model_path` that hold its external data, each checked to be there.

    Raises: UserError when the model is no protobuf message, or when a location is absolute, leaves
        the model's directory, is a link or is missing.
    """
    locations: set[str] = set()
    try:
        with open(model_path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise ValueError("empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                locations.update(_locations(data, 0, len(data), "model"))
    except OSError as error:
        raise UserError(f"{model_path} cannot be read: {error.strerror}; {REMEDY}") from error
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{model_path} is truncated or damaged; needs an ONNX model; {REMEDY}"
        ) from error
    return tuple(_checked(model_path, location) for location in sorted(locations))


def _checked(model_path: Path, location: str) -> Path:
    parts = PurePosixPath(location).parts
    windows = PureWindowsPath(location)
    if not parts or ".." in parts or PurePosixPath(location).is_absolute() or "\0" in location:
        problem = "leaves the model's directory"
    elif "\\" in location or windows.drive:
        problem = "is no plain relative path"
    elif any(path.is_symlink() for path in _steps(model_path.parent, parts)):
        problem = "is a link"
    elif not (model_path.parent / location).is_file():
        problem = "is missing"
    else:
        return model_path.parent / location
    raise UserError(
        f"{model_path} keeps weights in {location!r}, which {problem}; "
        f"needs a file in {model_path.parent}; {REMEDY}"
    )


def _steps(directory: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Every path on the way from `directory` to the file that `parts` names, that file last."""
    for part in parts:
        directory = directory / part
        yield directory


def _locations(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[str]:
    """The `location` of every tensor below a message that lies in data[start:end]."""
    for field, first, last in _bytes_fields(data, start, end):
        if message == TENSOR:
            if field == EXTERNAL_DATA:
                yield from _location(data, first, last)
        elif field in FIELDS[message]:
            yield from _locations(data, first, last, FIELDS[message][field])


def _location(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    entry = {field: data[first:last] for field, first, last in _bytes_fields(data, start, end)}
    if entry.get(KEY) == b"location":
        yield entry.get(VALUE, b"").decode("utf-8")


def _bytes_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of every length-delimited field in data[start:end].

    Raises: ValueError when a field runs past the end or has an unknown wire type.
    """
    while start < end:
        tag, start = _varint(data, start)
        wire = tag & 7
        if wire == VARINT:
            start = _varint(data, start)[1]
        elif wire == BYTES:
            length, first = _varint(data, start)
            start = first + length
            if start <= end:
                yield tag >> 3, first, start
        elif wire in (FIXED64, FIXED32):
            start += 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if start > end:
            raise ValueError("a field runs past its message")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[start]
        value |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return value, start
    raise ValueError("varint of more than ten bytes")
