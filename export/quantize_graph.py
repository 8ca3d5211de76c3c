"""The nodes that quantised weights need, put in the place of those of a float32 graph.

Shapes: N out_features, K in_features, G = K ÷ block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from distill.artifact import UserError
from export.quantize_blocks import Blocks, packed_nibbles
from export.quantize_file import SourceGraph, WeightFile

MICROSOFT = "com.microsoft"
INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy_level: inputs are rounded to int8 in blocks, for integer arithmetic."""
QUANTISED_OPS = ("MatMulNBits", "DequantizeLinear", "GatherBlockQuantized")


@dataclass(frozen=True)
class Matrix:
    """One node that multiplies by a constant, stored as [N, K] if `transposed`, else as [K, N]."""

    node: onnx.NodeProto
    weight: str
    rows: int
    columns: int
    transposed: bool

    @property
    def name(self) -> str:
        return self.node.name or self.weight


def require_float32(source: SourceGraph) -> None:
    """Raise UserError unless the graph holds float32 weights and none that are quantised."""
    found = next((node.op_type for node in source.graph.node if node.op_type in QUANTISED_OPS), "")
    types = {value.type.tensor_type.elem_type for value in source.graph.output}
    if not found and types != {TensorProto.FLOAT}:
        names = sorted(TensorProto.DataType.Name(kind) for kind in types)
        found = f"outputs of {', '.join(names)}"
    if found:
        raise UserError(
            f"{source.directory} holds {found}; only a float32 graph can be quantised; "
            "give the fp32 directory of the same flavour"
        )


def matrices_of(source: SourceGraph) -> list[Matrix]:
    """Every MatMul by a constant matrix, and a tied head's Gemm, in the graph's order."""
    found = []
    for node in source.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in source.tensors:
            continue
        dims = source.tensors[node.input[1]].dims
        if len(dims) != 2:
            continue
        transposed = node.op_type == "Gemm"
        if transposed and ([a.name for a in node.attribute] != ["transB"] or len(node.input) > 2):
            continue
        rows, columns = (dims[0], dims[1]) if transposed else (dims[1], dims[0])
        found.append(Matrix(node, node.input[1], rows, columns, transposed))
    return found


def weight_of(source: SourceGraph, matrix: Matrix) -> np.ndarray:
    """float32 [N, K], whichever way the node reads it."""
    w = source.array(matrix.weight)
    return w if matrix.transposed else w.T


def embedding_nodes(source: SourceGraph) -> list[onnx.NodeProto]:
    """Gathers of rows of a constant table by the token ids."""
    return [
        node
        for node in source.graph.node
        if node.op_type == "Gather"
        and node.input[1] == "input_ids"
        and len(getattr(source.tensors.get(node.input[0]), "dims", ())) == 2
    ]


def put_matmul_nbits(source: SourceGraph, file: WeightFile, matrix: Matrix, blocks: Blocks) -> None:
    """MatMulNBits in the matrix' place, under its name, giving the same value."""
    rows, groups = blocks.scale_NG.shape
    packed = blocks.q_NK if blocks.bits == 8 else packed_nibbles(blocks.q_NK)
    base = matrix.weight
    size = (rows, groups, packed.shape[1] // groups)
    file.add(f"{base}_quantised", packed.reshape(size))
    file.add(f"{base}_scales", blocks.scale_NG)
    file.add(f"{base}_zeros", _packed_zeros(blocks))
    names = [f"{base}_{part}" for part in ("quantised", "scales", "zeros")]
    node = helper.make_node(
        "MatMulNBits",
        [matrix.node.input[0], *names],
        list(matrix.node.output),
        name=matrix.node.name,
        domain=MICROSOFT,
        K=matrix.columns,
        N=matrix.rows,
        bits=blocks.bits,
        block_size=blocks.block,
        accuracy_level=INT8_ACTIVATIONS,
    )
    source.replace(matrix.node, [node])


def put_quantised_embedding(
    source: SourceGraph,
    file: WeightFile,
    gather: onnx.NodeProto,
    blocks: Blocks,
    shared_with: str | None,
) -> None:
    """GatherBlockQuantized in the place of a Gather; `shared_with`: the head's matrix of the same
    values, whose bytes in the data file are then used."""
    table = gather.input[0]
    packed = blocks.q_NK if blocks.bits == 8 else packed_nibbles(blocks.q_NK)
    data = f"{table}_table"
    if shared_with is None:
        file.add(data, packed)
        file.add(f"{table}_scales", blocks.scale_NG)
        file.add(f"{table}_zeros", _packed_zeros(blocks))
    else:
        file.alias(data, f"{shared_with}_quantised", packed.shape)
    node = helper.make_node(
        "GatherBlockQuantized",
        [data, gather.input[1], f"{table}_scales", f"{table}_zeros"],
        list(gather.output),
        name=gather.name,
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=blocks.block,
        bits=blocks.bits,
    )
    source.replace(gather, [node])


def put_weight_dequantised(
    source: SourceGraph, file: WeightFile, matrix: Matrix, blocks: Blocks, *, by_row: bool = False
) -> None:
    """DequantizeLinear before the MatMul or Gemm, in the layout that the node reads and in the
    graph's float type; `by_row`: 8 bits have one scale for each of the N rows, not for blocks."""
    signed = (blocks.q_NK.astype(np.int16) - 2 ** (blocks.bits - 1)).astype(np.int8)
    axis, scales = (1, blocks.scale_NG) if matrix.transposed else (0, blocks.scale_NG.T)
    values = signed if matrix.transposed else signed.T
    base = matrix.weight
    if blocks.bits == 8:
        file.add(f"{base}_quantised", values)
    else:
        nibbles = packed_nibbles(values.reshape(-1).view(np.uint8) & 0xF)
        file.add(f"{base}_quantised", nibbles, TensorProto.INT4, values.shape)
    place: dict[str, Any] = {"axis": axis, "block_size": blocks.block}
    if by_row and blocks.bits == 8:
        place, scales = {"axis": 1 - axis}, scales.reshape(-1)
    file.add(f"{base}_scales", scales.astype(source.float_type))
    wide = f"{base}_float"
    node = helper.make_node(
        "DequantizeLinear",
        [f"{base}_quantised", f"{base}_scales"],
        [wide],
        name=f"{matrix.node.name}/dequantised",
        **place,
    )
    multiply = onnx.NodeProto()
    multiply.CopyFrom(matrix.node)
    multiply.input[1] = wide
    source.replace(matrix.node, [node, multiply])


def put_float16_embedding(source: SourceGraph, file: WeightFile, gather: onnx.NodeProto) -> None:
    """The table in float16, its rows cast to float32 once they are picked, if they are that."""
    table = gather.input[0]
    if source.float_type == np.float16:
        return
    half = source.array(table).astype(np.float16)
    if not np.isfinite(half).all():
        return
    file.add(f"{table}_float16", half)
    picked = f"{gather.output[0]}/float16"
    nodes = [
        helper.make_node("Gather", [f"{table}_float16", gather.input[1]], [picked], gather.name),
        helper.make_node(
            "Cast", [picked], list(gather.output), f"{gather.name}/float32", to=TensorProto.FLOAT
        ),
    ]
    source.replace(gather, nodes)


def _packed_zeros(blocks: Blocks) -> np.ndarray:
    return blocks.zero_NG if blocks.bits == 8 else packed_nibbles(blocks.zero_NG)
