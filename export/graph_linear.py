"""Target modules as matmuls: one (keep), two (approximate) or none (remove).

A matmul node bears the path of its module, with `.down` or `.up` for the two of a factored one;
its weight is the stored matrix transposed to [in, out], under the stored name. Factored modules
that read the same input may share their down matmul: its names join theirs by "+" and a Split
follows. Dense ones never do: splitting their wide outputs costs more than one matmul saves.
The R neurons that are an interpolative module's skeleton need no second matrix: gate_proj and
up_proj join them to what their up matmul makes, down_proj adds to them what its down matmul makes.
B batch, S tokens, D in_features, E out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.graph_emitter import Emitter
from export.graph_step import Step
from export.graph_structure import Structure, parts_of, reads_skeleton


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
        narrow = [n for n in live if self.structure.decisions[n].action == "approximate"]
        together = narrow if self.share_inputs and len(narrow) > 1 else []
        made = {
            n: self._first_matmul(x_BSD, n, path)
            for n, (path, _) in parts.items()
            if n not in together
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

    def _first_matmul(self, x_BSD: ir.Value, module: str, path: str) -> ir.Value:
        """What a module's first matrix makes of x alone, plus the inputs that are its skeleton."""
        decision = self.structure.decisions[module]
        if not reads_skeleton(decision):
            return self._matmul(x_BSD, [path])
        rank, others = decision.rank, decision.in_features - decision.rank
        skeleton_BSR, others_BSX = self._split(x_BSD, module, skeleton=rank, others=others)
        made_BSR = self._matmul(others_BSX, [path])
        return self.emitter.op("Add", skeleton_BSR, made_BSR, name=f"{module}/interpolated")

    def _rest(self, module: str, first_BSR: ir.Value) -> ir.Value:
        """The up matmul of a factored module, the skeleton among its outputs, and the bias."""
        decision, bias_E = self.structure.decisions[module], self.bias(module)
        y_BSE = first_BSR
        if decision.action == "approximate":
            y_BSE = self._matmul(first_BSR, [f"{module}.up"])
            if decision.skeleton is not None and not reads_skeleton(decision):
                y_BSE = self._joined(module, decision.skeleton, first_BSR, y_BSE)
        if bias_E is None:
            return y_BSE
        return self.emitter.op("Add", y_BSE, bias_E, name=f"{module}/biased")

    def _joined(
        self, module: str, start: int, skeleton_BSR: ir.Value, others_BSX: ir.Value
    ) -> ir.Value:
        """y_BSE of an interpolative module: its skeleton is the outputs from `start` on."""
        decision = self.structure.decisions[module]
        after = decision.out_features - decision.rank - start
        if start and after:
            first, last = self._split(others_BSX, module, before=start, after=after)
            parts = [first, skeleton_BSR, last]
        else:
            parts = [others_BSX, skeleton_BSR] if start else [skeleton_BSR, others_BSX]
        return self.emitter.op("Concat", *parts, name=f"{module}/joined", axis=-1)

    def _split(self, x: ir.Value, module: str, **sizes: int) -> Sequence[ir.Value]:
        """The last axis in parts of these names and sizes."""
        return self.emitter.ops(
            "Split",
            x,
            self.emitter.constant(f"{module}/sizes", list(sizes.values())),
            outputs=[f"{module}/{part}" for part in sizes],
            name=f"{module}/split",
            axis=-1,
        )

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
