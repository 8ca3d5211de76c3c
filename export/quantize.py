"""Weight-only int8 and int4: a float32 graph with its matrices in small integers.

`ort` flavour: MatMulNBits, and GatherBlockQuantized for the embedding; a tied head and embedding
share one table. `standard` flavour: DequantizeLinear in blocks, symmetric (TensorRT takes no zero
points) before each MatMul, the embedding in float16. Activations, norms, cache and logits stay
float32. With `into` the integers go into a float16 graph of the standard flavour and are laid out
for TensorRT proper rather than TensorRT-RTX: 8 bits with one scale a row, 4 bits in blocks of 64.

int8 is rounded to nearest. int4 is fitted by GPTQ to the inputs that a text brings (by default one
that the model writes itself), the head and the table it shares included; where that changes too
much of what the model says, the matrices that lose most get 8 bits (`export.quantize_fit`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.artifact import MANIFEST, UserError
from distill.console import progress
from export.quantize_balance import Balance
from export.quantize_blocks import Blocks, quantised_blocks
from export.quantize_file import DATA, SourceGraph, WeightFile
from export.quantize_fit import WIDE_BITS, Fit
from export.quantize_graph import (
    Matrix,
    embedding_nodes,
    matrices_of,
    put_float16_embedding,
    put_matmul_nbits,
    put_quantised_embedding,
    put_weight_dequantised,
    require_float32,
)
from export.session import MODEL

BITS = {"int8": 8, "int4": 4}
BLOCK, TENSORRT_BLOCK = 32, 64  # TensorRT's int4 has blocks of 64 or 128
Method = Literal["nearest", "fitted"]


@dataclass(frozen=True)
class Layout:
    """Bits and block of every matrix. `by_row`: where there are 8 bits a row shares one scale, and
    there are 8 where `block` does not divide the inputs."""

    bits: int
    block: int
    by_row: bool

    def of(self, matrix: Matrix, *, wide: bool = False) -> tuple[int, int]:
        """Bits and block of one matrix; `wide`: 8 bits are wanted."""
        whole = self.by_row and matrix.columns % self.block != 0
        bits = WIDE_BITS if wide or whole else self.bits
        return bits, matrix.columns if self.by_row and bits == WIDE_BITS else self.block


@dataclass(frozen=True)
class Quantised:
    """What was done. `block`: weights that share a scale (0: those of a row);
    `eight_bit_matrices`: those that have 8 bits each; `self_text_kl`: divergence from the float32
    graph on its own text, nats a token; `shared_table`: head and embedding are one table in the
    file; `float_bytes` and `weight_bytes`: data file before and after."""

    flavour: str
    bits: int
    block: int
    method: str
    matrices: int
    eight_bit_matrices: int
    self_text_kl: float | None
    shared_table: bool
    nodes: int
    float_bytes: int
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    source_directory: Path,
    directory: Path,
    precision: str,
    *,
    into: Path | None = None,
    block: int | None = None,
    method: Method | None = None,
    text_ids_BT: np.ndarray | None = None,
    show_progress: bool = True,
) -> Quantised:
    """Write a float32 ONNX directory to `directory` with int8 or int4 weights.

    Args:
        precision: "int8" or "int4".
        into: directory of the same graph in float16, whose matrices are replaced.
        block: weights that share a scale: 16, 32, 64 or 128, which divides the inputs of every
            matrix; None: 32, with `into` 64, or 8 bits where that does not divide them.
        method: None: "nearest" for int8, "fitted" for int4.
        text_ids_BT: texts that int4 is fitted to; None: 4,096 tokens that the float32 graph writes.
    Raises: UserError when the source is not float32, damaged, or `block` does not divide a matrix.
    """
    source_directory, directory = Path(source_directory), Path(directory)
    if precision not in BITS:
        raise UserError(f"precision {precision!r}; allowed are {', '.join(BITS)}; choose one")
    bits = BITS[precision]
    method = method or ("fitted" if bits == 4 else "nearest")
    source = SourceGraph(source_directory)
    require_float32(source)
    matrices = matrices_of(source)
    layout = Layout(bits, block or (BLOCK if into is None else TENSORRT_BLOCK), into is not None)
    if into is None:
        _require_block(source_directory, matrices, layout.block)
    fit = Fit(source_directory, matrices, text_ids_BT) if method == "fitted" else None
    symmetric = source.flavour == "standard"
    blocks: dict[str, Blocks] = {}
    wide: set[str] = set()

    whole_rows = {m.name for m in matrices if layout.by_row and layout.of(m)[0] == WIDE_BITS}
    balance = Balance(source, matrices, whole_rows)

    def rounded(matrix: Matrix) -> Blocks:
        of_bits, of_block = layout.of(matrix, wide=matrix.name in wide)
        w_NK = balance.weight(matrix)
        if fit is None or of_bits > bits:
            return quantised_blocks(w_NK, of_bits, of_block, symmetric=symmetric)
        return fit.blocks(matrix, w_NK, of_bits, of_block, symmetric=symmetric)

    with progress(
        len(matrices), f"{precision} weights", unit="matrices", enabled=show_progress
    ) as shown:
        for matrix in matrices:
            blocks[matrix.name] = rounded(matrix)
            shown.update(1)
    _copy_companions(source_directory, directory)
    written = _write(into or source_directory, directory, blocks, layout)
    while fit is not None and (wider := fit.to_widen(directory)):
        wide |= wider
        changed = wider | balance.add(wider) if layout.by_row else wider
        for matrix in matrices:
            if matrix.name in changed:
                blocks[matrix.name] = rounded(matrix)
        written = _write(into or source_directory, directory, blocks, layout)
    return Quantised(
        flavour=source.flavour,
        bits=bits,
        block=0 if layout.by_row and bits == WIDE_BITS else layout.block,
        method=method,
        matrices=len(matrices),
        eight_bit_matrices=sum(each.bits == WIDE_BITS for each in blocks.values()),
        self_text_kl=None if fit is None else fit.kl,
        shared_table=written.shared_table,
        nodes=written.nodes,
        float_bytes=(source_directory / DATA).stat().st_size,
        weight_bytes=(directory / DATA).stat().st_size,
    )


@dataclass(frozen=True)
class _Written:
    nodes: int
    shared_table: bool


def _write(
    source_directory: Path, directory: Path, blocks: Mapping[str, Blocks], layout: Layout
) -> _Written:
    """The graph with these integers in the place of its matrices, the rest beside them. An
    embedding that is the same table as the head goes with it."""
    source, shared = SourceGraph(source_directory), False
    standard = source.flavour == "standard"
    with open(directory / DATA, "wb") as opened:
        file = WeightFile(opened)
        embeddings = {node.input[0]: node for node in embedding_nodes(source)}
        for matrix in matrices_of(source):
            found = blocks[matrix.name]
            if standard:
                put_weight_dequantised(source, file, matrix, found, by_row=layout.by_row)
                continue
            put_matmul_nbits(source, file, matrix, found)
            if matrix.transposed and matrix.weight in embeddings:
                node = embeddings.pop(matrix.weight)
                put_quantised_embedding(source, file, node, found, matrix.weight)
                shared = True
        for table, node in embeddings.items():
            if standard:
                put_float16_embedding(source, file, node)
                continue
            found = quantised_blocks(
                source.array(table), layout.bits, layout.block, symmetric=False
            )
            put_quantised_embedding(source, file, node, found, None)
        return _Written(source.write(directory / MODEL, file), shared)


def _require_block(directory: Path, matrices: Sequence[Matrix], block: int) -> None:
    if block not in (16, 32, 64, 128):
        raise UserError(f"block {block}; allowed are 16, 32, 64 and 128; choose one of them")
    for matrix in matrices:
        if matrix.columns % block:
            raise UserError(
                f"{directory}: {matrix.name} has {matrix.columns} inputs, which blocks of {block} "
                f"do not divide; quantising needs ranks and widths that are multiples of {block}; "
                f"distil with --rank-multiple {block} or export fp16"
            )


def _copy_companions(source: Path, directory: Path) -> None:
    """Everything beside the graph: tokenizer, configs, plan."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in (MODEL, DATA, MANIFEST):
            shutil.copy2(path, directory / path.name)
