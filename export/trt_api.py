"""The part of TensorRT that this project uses: one interface for TensorRT 10, 11 and TensorRT-RTX.

Standard library only: a build kit carries this file to machines that have nothing but TensorRT.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

Flavour = Literal["tensorrt", "tensorrt_rtx"]

PRODUCT = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL = {
    "tensorrt": (
        "install it with: pip install tensorrt (here, in an environment without onnxruntime: pip "
        "install -c constraints.txt -e '.[gpu]'; on a Jetson it comes with JetPack: "
        "sudo apt install python3-libnvinfer)"
    ),
    "tensorrt_rtx": "install it with: pip install -c constraints.txt -e '.[rtx]'",
}


class BuildError(Exception):
    """One line: what was received; what is allowed; what to do next."""


class Tensor(Protocol):
    """An input, output or layer output of a network; -1 in `shape` is a dynamic dimension."""

    name: str
    shape: Sequence[int]
    dtype: Any
    is_shape_tensor: bool


class Layer(Protocol):
    name: str
    type: Any
    num_outputs: int

    def get_output(self, index: int) -> Tensor: ...


class Network(Protocol):
    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int) -> Tensor: ...

    def get_output(self, index: int) -> Tensor: ...

    def get_layer(self, index: int) -> Layer: ...


class TensorRt(Protocol):
    """The module `tensorrt` or `tensorrt_rtx`; what a release lacks is looked up with hasattr."""

    __version__: str
    Builder: Any
    BuilderFlag: Any
    ILogger: Any
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    OnnxParser: Any


def load_tensorrt(flavour: Flavour) -> TensorRt:
    """Import TensorRT. Raises: BuildError with the command that installs it."""
    try:
        return cast(TensorRt, importlib.import_module(flavour))
    except ImportError as error:
        raise BuildError(
            f"{PRODUCT[flavour]} cannot be imported ({error}); needs the Python module "
            f"{flavour}; {INSTALL[flavour]}"
        ) from None
    except OSError as error:
        raise BuildError(
            f"{PRODUCT[flavour]} is installed but does not load ({error}); needs its libraries "
            f"and the NVIDIA driver; {INSTALL[flavour]}"
        ) from None


def installed(flavour: Flavour) -> bool:
    """Whether the module imports."""
    try:
        load_tensorrt(flavour)
    except BuildError:
        return False
    return True


def quiet_logger(trt: TensorRt) -> Any:
    """A TensorRT logger that prints nothing and keeps what went wrong in `.errors`."""

    class QuietLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (self.INTERNAL_ERROR, self.ERROR):
                self.errors.append(" ".join(message.split()))

    return QuietLogger()
