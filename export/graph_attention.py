"""Self-attention of one layer, cached, in two flavours.

`ort`: one Attention node that appends to the cache itself. `standard`: keys and values appended by
Concat and an Attention node with a single output, which is what TensorRT's parser wants.
Shapes: B batch, S new tokens, T columns of the cache, H query heads, G key/value heads, D head
dimension, E = H · D.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from export.graph_config import Architecture
from export.graph_emitter import Emitter
from export.graph_linear import Linears
from export.graph_norm import rms_norm
from export.graph_step import Step


class Attention:
    """Emits the attention of every layer."""

    def __init__(
        self, emitter: Emitter, step: Step, linears: Linears, architecture: Architecture
    ) -> None:
        self.emitter = emitter
        self.step = step
        self.linears = linears
        self.architecture = architecture

    def reads_input(self, layer: int) -> bool:
        """Whether any of the projections is computed, so that the block's input is needed."""
        return any(self.linears.is_live(f"{_path(layer)}.{n}_proj") for n in "qkv")

    def is_live(self, layer: int) -> bool:
        """Whether what attention mixes reaches the output projection."""
        return self.linears.is_live(f"{_path(layer)}.o_proj")

    def context_BSE(self, x_BSD: ir.Value | None, layer: int) -> ir.Value:
        """What every query gathers from the values: the input of the output projection."""
        path = _path(layer)
        q, k, v = self.linears.apply(x_BSD, [f"{path}.{n}_proj" for n in "qkv"])
        if self.emitter.flavour == "ort":
            return self._fused(layer, q, k, v)
        return self._standard(layer, q, k, v)

    def dead(self, layer: int) -> None:
        """A layer whose attention reaches nothing: its cache grows by zeros."""
        for kind in ("key", "value"):
            self._grown(layer, kind, self.step.zero_heads_BGSD())

    def _fused(self, layer: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        a = self.architecture
        q_BSE = self._rotated(self._normed_flat(q, layer, "q"), layer, "q")
        k_BSE = self._rotated(self._normed_flat(k, layer, "k"), layer, "k")
        past_key, past_value = self.step.past[layer]
        names = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        y_BSE, *present = self.emitter.ops(
            "Attention",
            q_BSE,
            k_BSE,
            v,
            self.step.mask_B1ST(a.windows[layer]),
            past_key,
            past_value,
            outputs=[f"{_path(layer)}/attention", *names],
            q_num_heads=a.heads,
            kv_num_heads=a.kv_heads,
            scale=float(a.attention_scale),
        )
        for value, name in zip(present, names, strict=True):
            self._present(value, name)
        return y_BSE

    def _standard(self, layer: int, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        a, e, path = self.architecture, self.emitter, _path(layer)
        q_BSHD, k_BSGD = (self._normed(x, layer, n) for x, n in ((q, "q"), (k, "k")))
        q_BHSD = self._rotated(self._heads_first(q_BSHD, layer, "q"), layer, "q")
        k_BGSD = self._rotated(self._heads_first(k_BSGD, layer, "k"), layer, "k")
        v_BGSD = self._heads_first(self._split(v, layer, "v"), layer, "v")
        grown = [
            self._grown(layer, kind, new) for kind, new in (("key", k_BGSD), ("value", v_BGSD))
        ]
        y_BHSD = e.op(
            "Attention",
            q_BHSD,
            *grown,
            self.step.mask_B1ST(a.windows[layer]),
            name=f"{path}/attention",
            scale=float(a.attention_scale),
        )
        y_BSHD = e.op("Transpose", y_BHSD, name=f"{path}/tokens_first", perm=[0, 2, 1, 3])
        shape = e.constant("flat_heads", [0, 0, a.heads * a.head_dim])
        return e.op("Reshape", y_BSHD, shape, name=f"{path}/context")

    def _grown(self, layer: int, kind: str, new_BGSD: ir.Value) -> ir.Value:
        """The layer's cached keys or values with the new ones appended, also an output."""
        past = self.step.past[layer][0 if kind == "key" else 1]
        name = f"present.{layer}.{kind}"
        value_BGTD = self.emitter.op("Concat", past, new_BGSD, name=name, axis=2)
        self._present(value_BGTD, name)
        return value_BGTD

    def _normed_flat(self, x_BSE: ir.Value, layer: int, which: str) -> ir.Value:
        """Query or key normalised head by head, where the family does that."""
        if not self.architecture.qk_norms:
            return x_BSE
        split = self._normed(x_BSE, layer, which)
        flat = self.emitter.constant("flat", [0, 0, -1])
        return self.emitter.op("Reshape", split, flat, name=f"{_path(layer)}/{which}_flat")

    def _normed(self, x_BSE: ir.Value, layer: int, which: str) -> ir.Value:
        x_BSHD = self._split(x_BSE, layer, which)
        if not self.architecture.qk_norms:
            return x_BSHD
        name = f"{_path(layer)}.{which}_norm"
        return rms_norm(self.emitter, self.architecture, x_BSHD, name)

    def _split(self, x_BSE: ir.Value, layer: int, which: str) -> ir.Value:
        shape = self.emitter.constant("split_heads", [0, 0, -1, self.architecture.head_dim])
        return self.emitter.op("Reshape", x_BSE, shape, name=f"{_path(layer)}/{which}_split")

    def _heads_first(self, x_BSHD: ir.Value, layer: int, which: str) -> ir.Value:
        name = f"{_path(layer)}/{which}_heads"
        return self.emitter.op("Transpose", x_BSHD, name=name, perm=[0, 2, 1, 3])

    def _rotated(self, x: ir.Value, layer: int, which: str) -> ir.Value:
        """RoPE by the position ids; x is [B, S, heads · D] or [B, heads, S, D]."""
        a = self.architecture
        cos, sin = self.step.cos_sin_BSD(a.layer_ropes[layer])
        attributes: dict[str, Any] = {}
        if self.emitter.flavour == "ort":
            attributes["num_heads"] = a.heads if which == "q" else a.kv_heads
        name = f"{_path(layer)}/{which}_rotated"
        return self.emitter.op("RotaryEmbedding", x, cos, sin, name=name, **attributes)

    def _present(self, value: ir.Value, name: str) -> None:
        sizes: list[int | str] = [
            "batch",
            self.architecture.kv_heads,
            "total",
            self.architecture.head_dim,
        ]
        self.emitter.output(value, name, sizes)


def _path(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"
