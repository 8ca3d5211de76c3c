"""The decoder, layer by layer: embedding, attention, MLP, head.

Shapes: B batch, S new tokens, K positions with logits, D hidden size, F intermediate size,
V vocabulary.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.graph_attention import Attention
from export.graph_config import Architecture
from export.graph_emitter import MICROSOFT, Emitter
from export.graph_linear import Linears
from export.graph_norm import Residual, rms_norm
from export.graph_step import Step

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head"


class Decoder:
    """Emits one whole graph."""

    def __init__(
        self, emitter: Emitter, step: Step, linears: Linears, architecture: Architecture
    ) -> None:
        self.emitter = emitter
        self.step = step
        self.linears = linears
        self.architecture = architecture
        self.attention = Attention(emitter, step, linears, architecture)

    def emit(self) -> None:
        stream = Residual(self.emitter, self.architecture, self._embedded_BSD())
        for layer in range(self.architecture.layers):
            self._attention(stream, layer)
            self._mlp(stream, layer)
        logits_BKV = self._head(stream.normed_BSD("model.norm"))
        self.emitter.output(logits_BKV, "logits", ["batch", "kept", self.architecture.vocabulary])
        outputs = self.emitter.graph.outputs
        outputs.insert(0, outputs.pop())

    def _embedded_BSD(self) -> ir.Value:
        e, scale = self.emitter, self.architecture.embedding_scale
        x_BSD = e.op("Gather", e.vector(EMBEDDING), self.step.input_ids, name="model.embed_tokens")
        if scale is None:
            return x_BSD
        return e.op(
            "Mul", x_BSD, e.number("embedding_scale", scale), name="model.embed_tokens/scaled"
        )

    def _attention(self, stream: Residual, layer: int) -> None:
        path = f"model.layers.{layer}"
        is_last = layer == self.architecture.layers - 1
        context = None
        if self.attention.is_live(layer):
            x_BSD = None
            if self.attention.reads_input(layer):
                x_BSD = stream.normed_BSD(f"{path}.input_layernorm")
            context = self.attention.context_BSE(x_BSD, layer)
        else:
            self.attention.dead(layer)
        if is_last:  # from here on nothing mixes positions
            stream.replace(self.step.kept(stream.value_BSD(), "kept"))
            if context is not None:
                context = self.step.kept(context, "kept_context")
        module, norm = f"{path}.self_attn.o_proj", f"{path}.post_attention_layernorm"
        self._add_branch(stream, context, module, norm, f"{path}/attended")

    def _mlp(self, stream: Residual, layer: int) -> None:
        path = f"model.layers.{layer}"
        down = f"{path}.mlp.down_proj"
        sandwich = self.architecture.sandwich_norms
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        y_BSF = None
        if self.linears.is_live(down):
            modules = [f"{path}.mlp.{name}_proj" for name in ("gate", "up")]
            x_BSD = None
            if any(map(self.linears.is_live, modules)):
                x_BSD = stream.normed_BSD(f"{path}.{before}")
            gate_BSF, up_BSF = self.linears.apply(x_BSD, modules)
            active_BSF = self._activated(gate_BSF, f"{path}.mlp.act_fn")
            y_BSF = self.emitter.op("Mul", active_BSF, up_BSF, name=f"{path}.mlp/gated")
        norm = f"{path}.post_feedforward_layernorm"
        self._add_branch(stream, y_BSF, down, norm, f"{path}/output")

    def _add_branch(
        self, stream: Residual, y: ir.Value | None, module: str, norm: str, name: str
    ) -> None:
        """Add to the stream what the branch's last module makes of y: its bias alone if None."""
        branch = self.linears.bias(module) if y is None else self.linears.apply(y, [module])[0]
        if branch is None:
            return
        if self.architecture.sandwich_norms:
            branch = rms_norm(self.emitter, self.architecture, branch, norm)
        (stream.add_constant if y is None else stream.add)(branch, name)

    def _activated(self, x: ir.Value, name: str) -> ir.Value:
        e, kind = self.emitter, self.architecture.activation
        if kind == "silu" and e.flavour == "ort":
            return e.op("QuickGelu", x, name=name, domain=MICROSOFT, alpha=1.0)
        if kind == "silu":
            return e.op("Mul", x, e.op("Sigmoid", x, name=f"{name}/sigmoid"), name=name)
        return e.op("Gelu", x, name=name, approximate="tanh" if kind == "gelu_tanh" else "none")

    def _head(self, x_BKD: ir.Value) -> ir.Value:
        logits_BKV = self._tied(x_BKD) if self.architecture.tied_head else self._untied(x_BKD)
        cap = self.architecture.logits_softcap
        if cap is None:
            return logits_BKV
        e, limit = self.emitter, self.emitter.number("logits_softcap", cap)
        small = e.op(
            "Tanh", e.op("Div", logits_BKV, limit, name="logits/share"), name="logits/tanh"
        )
        return e.op("Mul", small, limit, name="logits/capped")

    def _untied(self, x_BKD: ir.Value) -> ir.Value:
        return self.emitter.op("MatMul", x_BKD, self.emitter.matrix([f"{HEAD}.weight"]), name=HEAD)

    def _tied(self, x_BKD: ir.Value) -> ir.Value:
        """Gemm reads the embedding table [V, D] as it is, so that it is stored once."""
        e, a = self.emitter, self.architecture
        rows = e.op("Reshape", x_BKD, e.constant("rows", [-1, a.hidden]), name=f"{HEAD}/rows")
        flat = e.op("Gemm", rows, e.vector(EMBEDDING), name=HEAD, transB=1)
        sizes = e.op("Shape", x_BKD, name=f"{HEAD}/sizes", start=0, end=2)
        wide = e.constant("vocabulary", np.array([a.vocabulary], np.int64))
        shape = e.op("Concat", sizes, wide, name=f"{HEAD}/shape", axis=0)
        return e.op("Reshape", flat, shape, name=f"{HEAD}/logits")
