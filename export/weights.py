"""The tensors of a safetensors checkpoint as memory-mapped numpy arrays: nothing is unpickled.

safetensors' own numpy reader does not know bfloat16, so the header is read here and bfloat16 comes
from ml_dtypes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from distill.artifact import UserError, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
MAX_HEADER_BYTES = 100_000_000
REMEDY = "needs a complete safetensors checkpoint; write it again with: python -m distill"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    offset_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Weights:
    """All tensors of one checkpoint, read when asked for."""

    def __init__(self, directory: Path, stored: dict[str, Stored]) -> None:
        self.directory = directory
        self._stored = stored

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """Read the header of every shard.

        Raises: UserError when a shard is missing, truncated or damaged, or lacks a tensor that
            the index names.
        """
        directory = Path(directory)
        file_of = _shards(directory / INDEX) if (directory / INDEX).exists() else {}
        stored: dict[str, Stored] = {}
        for name in sorted(set(file_of.values())) or [SINGLE]:
            stored |= _read_header(directory / name)
        if absent := sorted(file_of.keys() - stored.keys()):
            raise UserError(f"{directory} lacks the tensor {absent[0]}; {REMEDY}")
        return cls(directory, stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @property
    def names(self) -> list[str]:
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises: UserError when there is no such tensor."""
        return self._of(name).shape

    def array(self, name: str) -> np.ndarray:
        """The tensor in its stored type, read-only and memory-mapped.

        Raises: UserError when there is no such tensor.
        """
        at = self._of(name)
        if 0 in at.shape:
            return np.zeros(at.shape, at.dtype)
        return np.memmap(at.file, at.dtype, mode="r", offset=at.offset_bytes, shape=at.shape)

    def _of(self, name: str) -> Stored:
        try:
            return self._stored[name]
        except KeyError:
            raise UserError(f"{self.directory} lacks the tensor {name}; {REMEDY}") from None


def _shards(index_file: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    index = read_json(index_file)
    file_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(file_of, dict) or not all(map(_is_plain_name, file_of.values())):
        raise UserError(f"{index_file} names no shards beside it; {REMEDY}")
    return file_of


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _read_header(file: Path) -> dict[str, Stored]:
    """Tensor name -> place, from one shard."""
    try:
        with open(file, "rb") as opened:
            size_bytes = os.fstat(opened.fileno()).st_size
            header_bytes = int.from_bytes(opened.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise UserError(f"{file} is truncated or no safetensors file; {REMEDY}")
            header = json.loads(opened.read(header_bytes))
        data_bytes = size_bytes - 8 - header_bytes
        return {
            name: _stored(file, 8 + header_bytes, data_bytes, name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {REMEDY}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; {REMEDY}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a damaged header ({error}); {REMEDY}") from None


def _stored(file: Path, start: int, data_bytes: int, name: str, entry: Any) -> Stored:
    if entry["dtype"] not in FLOAT_TYPES:
        allowed = " ".join(FLOAT_TYPES)
        raise UserError(f"{file}: {name} has type {entry['dtype']}; needs {allowed}; {REMEDY}")
    dtype = np.dtype(FLOAT_TYPES[entry["dtype"]])
    shape = tuple(int(size) for size in entry["shape"])
    first, last = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= first <= last <= data_bytes or last - first != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{file} is truncated: {name} lies outside it; {REMEDY}")
    return Stored(file, start + first, dtype, shape)
