"""What is computed once per call and used by every layer: sizes, masks, rotations, zeros.

Shapes: B batch, S new tokens, P cached tokens, T = P + S columns of the cache, D head dimension,
E out_features, G key/value heads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph_config import Architecture, Rotary
from export.graph_emitter import Emitter

LOWEST = {ir.DataType.FLOAT: -1e9, ir.DataType.FLOAT16: -3e4, ir.DataType.BFLOAT16: -1e9}
"""Added to a forbidden score: far below any score, and never -inf, so that a query row with no
allowed column at all gives finite numbers."""
INT_MAX = 2**63 - 1


class Step:
    """Shared values of one call, each emitted when first asked for."""

    def __init__(self, emitter: Emitter, architecture: Architecture) -> None:
        self.emitter = emitter
        self.architecture = architecture
        int64 = ir.DataType.INT64
        self.input_ids = emitter.input("input_ids", int64, ["batch", "sequence"])
        self.attention_mask = emitter.input("attention_mask", int64, ["batch", "total"])
        self.position_ids = emitter.input("position_ids", int64, ["batch", "sequence"])
        cache: list[int | str] = ["batch", architecture.kv_heads, "past", architecture.head_dim]
        self.past = [
            (
                emitter.input(f"past_key_values.{layer}.key", emitter.float_type, cache),
                emitter.input(f"past_key_values.{layer}.value", emitter.float_type, cache),
            )
            for layer in range(architecture.layers)
        ]
        self.logits_to_keep = emitter.input("logits_to_keep", int64, [1])
        emitter.register_default(self.logits_to_keep, np.array([2**31 - 1], np.int64))
        self._made: dict[str, ir.Value] = {}

    def mask_B1ST(self, window: int | None) -> ir.Value:
        """0 where a query may look, LOWEST elsewhere: causal, no padding, within the window.

        Rows and columns count tokens in the cache, padding included, as transformers does.
        """
        name = "mask" if window is None else f"mask_window_{window}"
        if name in self._made:
            return self._made[name]
        e = self.emitter
        allowed = self._allowed_B1ST()
        if window is not None:
            first = e.op(
                "Sub", self._rows_S1(), e.constant("window", [window]), name=f"{name}/before"
            )
            near = e.op("Greater", self._columns_T(), first, name=f"{name}/near")
            allowed = e.op("And", allowed, near, name=f"{name}/allowed")
        low = e.number("lowest", LOWEST[e.float_type])
        self._made[name] = e.op("Where", allowed, e.number("zero", 0.0), low, name=name)
        return self._made[name]

    def cos_sin_BSD(self, kind: str) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine [B, S, D / 2] of every position's angles, computed in float32."""
        if f"{kind}/cos" not in self._made:
            for function in ("Cos", "Sin"):
                self._made[f"{kind}/{function.lower()}"] = self._rotation(
                    function, kind, self.architecture.ropes[kind]
                )
        return self._made[f"{kind}/cos"], self._made[f"{kind}/sin"]

    def rows_BSE(self, value_E: ir.Value, width: int) -> ir.Value:
        """A bias [E], or a scalar, repeated for every token."""
        e, name = self.emitter, f"{value_E.name}/rows_{width}"
        if name not in self._made:
            shape = e.op(
                "Concat",
                self._size("batch"),
                self._size("sequence"),
                e.constant(f"width_{width}", [width]),
                name=f"{name}/shape",
                axis=0,
            )
            self._made[name] = e.op("Expand", value_E, shape, name=name)
        return self._made[name]

    def zero_heads_BGSD(self) -> ir.Value:
        """Zeros of the shape of one call's keys or values."""
        e, name = self.emitter, "zero_heads"
        if name not in self._made:
            heads, size = self.architecture.kv_heads, self.architecture.head_dim
            shape = e.op(
                "Concat",
                self._size("batch"),
                e.constant("kv_heads", [heads]),
                self._size("sequence"),
                e.constant("head_dim", [size]),
                name=f"{name}/shape",
                axis=0,
            )
            self._made[name] = e.op("Expand", e.number("zero", 0.0), shape, name=name)
        return self._made[name]

    def kept(self, value_BSE: ir.Value, name: str) -> ir.Value:
        """The last `logits_to_keep` positions of every sequence."""
        e = self.emitter
        if "first_kept" not in self._made:
            self._made["first_kept"] = e.op("Neg", self.logits_to_keep, name="first_kept")
        start, end = self._made["first_kept"], e.constant("end", [INT_MAX])
        return e.op("Slice", value_BSE, start, end, e.constant("axis_1", [1]), name=name)

    def _allowed_B1ST(self) -> ir.Value:
        """Causal and not padding."""
        if "allowed" not in self._made:
            e = self.emitter
            causal = e.op("LessOrEqual", self._columns_T(), self._rows_S1(), name="causal")
            real = e.op("Cast", self.attention_mask, name="real", to=ir.DataType.BOOL)
            real = e.op("Unsqueeze", real, e.constant("axes_1_2", [1, 2]), name="real_columns")
            self._made["allowed"] = e.op("And", causal, real, name="allowed")
        return self._made["allowed"]

    def _columns_T(self) -> ir.Value:
        """0 … T - 1."""
        if "columns" not in self._made:
            e = self.emitter
            start, step = (e.constant(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
            self._made["columns"] = e.op(
                "Range", start, self._scalar("total"), step, name="columns"
            )
        return self._made["columns"]

    def _rows_S1(self) -> ir.Value:
        """P … T - 1 as a column: where in the cache every new token goes."""
        if "rows" not in self._made:
            e = self.emitter
            first = e.op("Sub", self._scalar("total"), self._scalar("sequence"), name="past")
            one = e.constant("int_1", np.array(1, np.int64))
            rows = e.op("Range", first, self._scalar("total"), one, name="positions")
            self._made["rows"] = e.op("Unsqueeze", rows, e.constant("axis_1", [1]), name="rows")
        return self._made["rows"]

    def _size(self, name: str) -> ir.Value:
        """[1] int64: the length of "batch", "sequence" or "total"."""
        if name not in self._made:
            source = self.attention_mask if name == "total" else self.input_ids
            start = 0 if name == "batch" else 1
            self._made[name] = self.emitter.op(
                "Shape", source, name=name, start=start, end=start + 1
            )
        return self._made[name]

    def _scalar(self, name: str) -> ir.Value:
        key = f"{name}/scalar"
        if key not in self._made:
            axis = self.emitter.constant("axis_0", [0])
            self._made[key] = self.emitter.op("Squeeze", self._size(name), axis, name=key)
        return self._made[key]

    def _rotation(self, function: str, kind: str, rotary: Rotary) -> ir.Value:
        e, name = self.emitter, f"{kind}/{function.lower()}"
        if f"{kind}/angles" not in self._made:
            if "position_column" not in self._made:
                at = e.op("Cast", self.position_ids, name="position", to=ir.DataType.FLOAT)
                axis = e.constant("axis_2", [2])
                self._made["position_column"] = e.op("Unsqueeze", at, axis, name="position_column")
            frequencies = e.constant(f"{kind}/inv_freq", rotary.inv_freq.astype(np.float32))
            self._made[f"{kind}/angles"] = e.op(
                "Mul", self._made["position_column"], frequencies, name=f"{kind}/angles"
            )
        value = e.op(function, self._made[f"{kind}/angles"], name=name)
        if rotary.scaling != 1.0:
            scaling = e.constant(f"{kind}/scaling", np.array(rotary.scaling, np.float32))
            value = e.op("Mul", value, scaling, name=f"{name}/scaled")
        if e.float_type == ir.DataType.FLOAT:
            return value
        return e.op("Cast", value, name=f"{name}/cast", to=e.float_type)
