"""RMS norms and the residual stream that they read. Shapes: B batch, S tokens, D hidden size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph_config import Architecture
from export.graph_emitter import MICROSOFT, Emitter


def rms_norm(emitter: Emitter, architecture: Architecture, x: ir.Value, module: str) -> ir.Value:
    """x over its root mean square along the last axis, times the module's scale.

    The standard flavour computes it in float32 whatever x is; ONNX Runtime's kernels do so inside.
    """
    epsilon = float(architecture.epsilon)
    island = emitter.flavour == "standard" and emitter.float_type != ir.DataType.FLOAT
    if not island:
        scale = norm_scale(emitter, architecture, module)
        return emitter.op("RMSNormalization", x, scale, name=module, axis=-1, epsilon=epsilon)
    scale = emitter.vector(f"{module}.weight", dtype=np.float32, offset=architecture.norm_offset)
    wide = emitter.op("Cast", x, name=f"{module}/float32", to=ir.DataType.FLOAT)
    y = emitter.op("RMSNormalization", wide, scale, name=f"{module}/norm", axis=-1, epsilon=epsilon)
    return emitter.op("Cast", y, name=module, to=emitter.float_type)


def norm_scale(emitter: Emitter, architecture: Architecture, module: str) -> ir.Value:
    return emitter.vector(f"{module}.weight", offset=architecture.norm_offset)


class Residual:
    """The residual stream [B, S, D]: what a branch adds is summed when somebody reads it.

    In the ort flavour that sum and the norm that reads it are one node.
    """

    def __init__(self, emitter: Emitter, architecture: Architecture, x_BSD: ir.Value) -> None:
        self.emitter = emitter
        self.architecture = architecture
        self._x_BSD = x_BSD
        self._pending: tuple[ir.Value, str] | None = None

    def add(self, branch_BSD: ir.Value, name: str) -> None:
        """Add a branch; the sum will be called `name`."""
        self.value_BSD()
        self._pending = (branch_BSD, name)

    def add_constant(self, branch_D: ir.Value, name: str) -> None:
        """Add the same vector to every token."""
        self.add(branch_D, name)
        self.value_BSD()

    def value_BSD(self) -> ir.Value:
        if self._pending is not None:
            branch, name = self._pending
            self._x_BSD = self.emitter.op("Add", self._x_BSD, branch, name=name)
            self._pending = None
        return self._x_BSD

    def replace(self, x_BSD: ir.Value) -> None:
        """Go on with another value, such as a slice of this one."""
        self._x_BSD, self._pending = x_BSD, None

    def normed_BSD(self, module: str) -> ir.Value:
        """The stream through the norm `module`."""
        if self._pending is None or self.emitter.flavour == "standard":
            return rms_norm(self.emitter, self.architecture, self.value_BSD(), module)
        branch, name = self._pending
        y_BSD, _, _, self._x_BSD = self.emitter.ops(
            "SkipSimplifiedLayerNormalization",
            self._x_BSD,
            branch,
            norm_scale(self.emitter, self.architecture, module),
            outputs=[module, "", "", name],
            domain=MICROSOFT,
            epsilon=float(self.architecture.epsilon),
        )
        self._pending = None
        return y_BSD
