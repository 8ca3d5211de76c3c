"""What an export prints when it is done: one row for each engine, and how to run it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from distill.artifact import MANIFEST, read_json
from distill.console import table

COLUMNS = (
    "engine", "nodes", "dense or narrow/factored/removed", "MB", "max logit difference", "top-1",
    "greedy", "cross-entropy change (nats)", "graph (s)", "engine (s)",
)  # fmt: skip


def print_closing_table(run: Path, exported: Sequence[tuple[Path, Path]]) -> None:
    """`exported`: the directories of every graph and of the engine built from it."""
    print()
    table("exported", COLUMNS, [_row(onnx, engine) for onnx, engine in exported])
    for _, engine in exported:
        if (engine / "kit.json").is_file():
            print(f"copy {engine} to the device and run there: python3 build.py")
        elif (engine / "device").is_dir():
            print(f"copy {engine / 'device'} to the device and run there: python3 build.py")
    name = f"{exported[-1][1].parent.name}/{exported[-1][1].name}"
    command = f"python -m deploy generate --run {shlex.quote(str(run))} --engine {name}"
    print(f"generate text with: {command} 'Once upon'")


def _row(onnx: Path, engine: Path) -> list[object]:
    graph = read_json(onnx / MANIFEST)["measured"]
    built = read_json(engine / MANIFEST)["measured"]
    parity = graph["parity"]
    return [
        f"{engine.parent.name}/{engine.name}",
        graph["nodes"],
        f"{graph['dense_matmuls']}/{graph['factored_matmuls']}/{graph['removed']}",
        round(_bytes(engine) / 1e6, 1),
        parity["max_logit_difference"],
        f"{parity['top1_agreement']:.2%}",
        f"{parity['greedy_matches']}/{parity['greedy_steps']}",
        parity["cross_entropy_change"],
        graph["seconds"],
        built["seconds"],
    ]


def _bytes(engine: Path) -> int:
    """Of the graph and its weights, or the engine and the graph that a kit carries."""
    patterns = ("model.onnx*", "model.engine", "device/model.onnx*")
    return sum(path.stat().st_size for pattern in patterns for path in engine.glob(pattern))
