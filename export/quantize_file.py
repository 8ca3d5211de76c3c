"""An ONNX graph whose weights are read one by one from its data file and written to another."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from export.external_data import external_data_files
from export.session import MODEL

DATA = f"{MODEL}.data"
ALIGNMENT_BYTES = 4096
INLINE_BYTES = 1024


class WeightFile:
    """Initializers written one after another to model.onnx.data, at aligned offsets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.initializers: list[TensorProto] = []

    def add(
        self, name: str, array: np.ndarray, kind: int | None = None, dims: tuple[int, ...] = ()
    ) -> None:
        """Store an array; `kind` and `dims` where its bytes mean another type, such as INT4."""
        tensor = TensorProto(name=name, dims=dims or array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        raw = np.ascontiguousarray(array).tobytes()
        if len(raw) < INLINE_BYTES:
            tensor.raw_data = raw
        else:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT_BYTES))
            place = {"location": DATA, "offset": self._file.tell(), "length": len(raw)}
            self._file.write(raw)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def alias(self, name: str, of: str, dims: tuple[int, ...]) -> None:
        """A second initializer of the same bytes in another shape."""
        tensor = TensorProto()
        tensor.CopyFrom(next(t for t in self.initializers if t.name == of))
        tensor.name = name
        del tensor.dims[:]
        tensor.dims.extend(dims)
        self.initializers.append(tensor)


class SourceGraph:
    """A graph read without its weights."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        external_data_files(directory / MODEL)
        self.model = onnx.load(directory / MODEL, load_external_data=False)
        self.graph = self.model.graph
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self._replacements: dict[str, list[onnx.NodeProto]] = {}

    @property
    def flavour(self) -> str:
        """ "ort" where nodes of ONNX Runtime's own are used, else "standard"."""
        return "ort" if any(node.domain for node in self.graph.node) else "standard"

    @property
    def float_type(self) -> np.dtype:
        """Type of the logits, the first output."""
        kind = self.graph.output[0].type.tensor_type.elem_type
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))

    def replace(self, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
        """Note that nodes take the place of one that gives the value `old.output[0]`."""
        self._replacements[old.output[0]] = new

    def write(self, path: Path, weights: WeightFile) -> int:
        """Write the graph with its replacements and new initializers; returns its nodes."""
        nodes = []
        for node in self.graph.node:
            nodes += self._replacements.get(node.output[0], [node])
        read = {name for node in nodes for name in node.input}
        written = {tensor.name for tensor in weights.initializers}
        for name in self.tensors:
            if name in read and name not in written:
                weights.add(name, self.array(name))
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(weights.initializers)
        path.write_bytes(model.SerializeToString())
        return len(nodes)

    def array(self, name: str) -> np.ndarray:
        """The values of one initializer."""
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])
        if tensor.data_location == TensorProto.EXTERNAL:
            external_data_helper.load_external_data_for_tensor(tensor, str(self.directory))
        return numpy_helper.to_array(tensor)
