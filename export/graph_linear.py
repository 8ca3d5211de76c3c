"""Target modules as matmuls: one (keep, narrow), two (approximate) or none (remove).

A matmul node bears the path of its module, with `.down` or `.up` for the two of a factored one;
its weight is the stored matrix transposed to [in, out], under the stored name. Factored modules
that read the same input may share their down matmul: its names join theirs by "+" and a Split
follows. Dense ones never do: splitting their wide outputs costs more than one matmul saves.
B batch, S tokens, D in_features, E out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.graph_emitter import Emitter
from export.graph_step import Step
from export.graph_structure import Structure, parts_of


class Matmuls:
    """Emits the live modules of one student."""

    def __init__(self, emitter: Emitter, structure: Structure, *, share_inputs: bool) -> None:
        self.emitter = emitter
        self.structure = structure
        self.share_inputs = share_inputs

    def is_live(self, module: str) -> bool:
        return self.structure.is_live(module)

    def live(self, x_BSD: ir.Value | None, modules: Sequence[str]) -> dict[str, ir.Value]:
        """y_BSE of the live ones of modules that all read x; x may be None when there is none."""
        live = [name for name in modules if self.is_live(name)]
        if not live:
            return {}
        assert x_BSD is not None
        first = self._first_matmuls(x_BSD, live)
        return {name: self._rest(name, first[name]) for name in live}

    def bias(self, module: str) -> ir.Value | None:
        name = self.structure.biases.get(module)
        return None if name is None else self.emitter.vector(name)

    def _first_matmuls(self, x_BSD: ir.Value, live: Sequence[str]) -> dict[str, ir.Value]:
        """What each module's first (or only) matrix makes of x."""
        parts = {name: parts_of(self.structure.decisions[name])[0] for name in live}
        pairs = [n for n in live if self.structure.decisions[n].action == "approximate"]
        together = pairs if self.share_inputs and len(pairs) > 1 else []
        made = {
            n: self._matmul(x_BSD, [path]) for n, (path, _) in parts.items() if n not in together
        }
        if not together:
            return made
        paths = [parts[name][0] for name in together]
        ranks = [parts[name][1][1] for name in together]
        label, joined = "+".join(paths), self._matmul(x_BSD, paths)
        sizes = self.emitter.constant(f"{label}/ranks", ranks)
        pieces = self.emitter.ops(
            "Split", joined, sizes, outputs=paths, name=f"{label}/split", axis=-1
        )
        return made | dict(zip(together, pieces, strict=True))

    def _rest(self, module: str, first_BSR: ir.Value) -> ir.Value:
        """The up matmul of a factored module, and the bias."""
        decision, bias_E = self.structure.decisions[module], self.bias(module)
        y_BSE = first_BSR
        if decision.action == "approximate":
            y_BSE = self._matmul(first_BSR, [f"{module}.up"])
        if bias_E is None:
            return y_BSE
        return self.emitter.op("Add", y_BSE, bias_E, name=f"{module}/biased")

    def _matmul(self, x_BSD: ir.Value, paths: Sequence[str]) -> ir.Value:
        weight_DE = self.emitter.matrix([f"{path}.weight" for path in paths])
        return self.emitter.op("MatMul", x_BSD, weight_DE, name="+".join(paths))


class Linears(Matmuls):
    """Emits the modules of one student, removed ones too."""

    def __init__(
        self, emitter: Emitter, step: Step, structure: Structure, *, share_inputs: bool
    ) -> None:
        super().__init__(emitter, structure, share_inputs=share_inputs)
        self.step = step

    def apply(self, x_BSD: ir.Value | None, modules: Sequence[str]) -> list[ir.Value]:
        """y_BSE of modules that all read x; x may be None when none of them is live."""
        live = self.live(x_BSD, modules)
        return [live[name] if name in live else self._constant(name) for name in modules]

    def _constant(self, module: str) -> ir.Value:
        """What a removed module makes of every token: its bias, or zeros."""
        value = self.bias(module) or self.emitter.number("zero", 0.0)
        return self.step.rows_BSE(value, self.structure.decisions[module].out_features)
