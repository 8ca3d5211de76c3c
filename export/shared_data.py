"""Equal tensors of an ONNX file stored once: ONNX Runtime writes a shared table out twice."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import onnx
from onnx import TensorProto

ALIGNMENT_BYTES = 4096


def share_equal_tensors(model_path: Path) -> int:
    """Rewrite the external data of a model with every distinct content once; returns bytes saved.

    All external tensors must lie in one file, as they do in what ONNX Runtime saves.
    """
    model = onnx.load(model_path, load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not tensors:
        return 0
    (name,) = {_entries(tensor)["location"] for tensor in tensors}
    data_path = model_path.parent / name
    before = data_path.stat().st_size
    shared_path = data_path.with_name(f"{name}.shared")
    places: dict[bytes, int] = {}
    with (
        open(data_path, "rb") as source,
        mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data,
        open(shared_path, "wb") as shared,
    ):
        for tensor in tensors:
            entries = _entries(tensor)
            start = int(entries.get("offset", 0))
            content = memoryview(data)[start : start + int(entries["length"])]
            digest = hashlib.sha256(content).digest()
            if digest not in places:
                shared.write(bytes(-shared.tell() % ALIGNMENT_BYTES))
                places[digest] = shared.tell()
                shared.write(content)
            content.release()
            _set_offset(tensor, places[digest])
    os.replace(shared_path, data_path)
    model_path.write_bytes(model.SerializeToString())
    return before - data_path.stat().st_size


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _set_offset(tensor: TensorProto, offset: int) -> None:
    entries = {**_entries(tensor), "offset": str(offset)}
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
