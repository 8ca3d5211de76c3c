"""The command line of ``python -m export``: one frozen dataclass, one field a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.artifact import UserError
from distill.flags import choice, flag, parse_flags, positive, switch, text

ENGINES = ("ort", "trt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
PROVIDERS = ("cpu", "cuda", "tensorrt")
PRECISIONS_OF = {
    ("ort", "cpu"): ("fp32", "fp16", "int8", "int4"),
    ("ort", "cuda"): ("fp32", "fp16", "bf16", "int8", "int4"),
    ("ort", "tensorrt"): ("fp32", "fp16", "bf16", "int8", "int4"),
    ("trt", ""): ("fp32", "fp16", "bf16", "int8", "int4"),
}
DEFAULT_PRECISION = {("ort", "cpu"): "int8", ("ort", "cuda"): "fp16", ("ort", "tensorrt"): "fp16"}


def _several(default: tuple[str, ...], help_text: str, allowed: Sequence[str]) -> Any:
    return flag(default, help_text, lambda v: bool(v) and set(v) <= set(allowed), " ".join(allowed))


@dataclass(frozen=True)
class ExportArgs:
    """Everything that shapes an export. Units and ranges stand in each flag's help."""

    run: str | None = text(
        None, "run folder whose student is exported (default: the newest)", "a folder or its name"
    )
    engine: tuple[str, ...] = _several(("ort",), "runtimes to build for", ENGINES)
    precision: tuple[str, ...] = flag(
        (),
        "weights and arithmetic; none given: int8 for ort on a CPU, fp16 elsewhere",
        lambda v: set(v) <= set(PRECISIONS),
        " ".join(PRECISIONS),
    )
    provider: str = choice("cpu", "ONNX Runtime's execution provider", PROVIDERS)
    target: tuple[str, ...] = flag(
        (),
        "GPU architectures of the TensorRT engine, such as sm86 or sm86,sm89; none given: the GPU "
        "here, or without one all that can be built ahead of time",
        lambda v: all(v),
        "smNN, several separated by commas or spaces",
    )
    all: bool = switch("every precision of every engine given")
    max_batch: int = positive(4, "largest batch of the TensorRT profiles")
    max_seq: int = positive(512, "longest prompt of the TensorRT profiles, tokens")
    max_past: int = positive(2048, "longest cache of the TensorRT profiles, tokens")
    workspace_gib: float = positive(4.0, "most device memory for TensorRT's tactics, GiB")
    parity_text: str | None = text(
        None, "text of the parity gate (default: a built-in passage)", "a UTF-8 text file"
    )
    overwrite: bool = switch("build again what exists already")

    def wanted(self) -> list[tuple[str, str]]:
        """(engine, precision) pairs to build, in order."""
        pairs = []
        for engine in self.engine:
            key = (engine, self.provider if engine == "ort" else "")
            if self.all:
                chosen: tuple[str, ...] = PRECISIONS_OF[key]
            else:
                chosen = self.precision or (DEFAULT_PRECISION.get(key, "fp16"),)
            pairs += [(engine, precision) for precision in PRECISIONS if precision in chosen]
        return pairs


def parse_args(argv: Sequence[str]) -> ExportArgs:
    """Parse and validate; raises UserError that reports every wrong flag at once."""
    values = parse_flags(
        ExportArgs,
        argv,
        prog="python -m export",
        description="Lower a student to ONNX, prove it equal, and build engines from it.",
    )
    args = ExportArgs(**values)
    args = replace(args, target=tuple(t for item in args.target for t in item.split(",") if t))
    problems = [
        f"--precision {precision}: the CPU provider of ONNX Runtime has no {precision} kernels; "
        f"allowed are {' '.join(PRECISIONS_OF['ort', 'cpu'])}; choose one or another --provider"
        for engine, precision in args.wanted()
        if engine == "ort" and precision not in PRECISIONS_OF["ort", args.provider]
    ]
    if args.all and args.precision:
        problems.append("--all and --precision exclude one another; give one of them")
    if args.target and "trt" not in args.engine:
        problems.append("--target belongs to TensorRT; add --engine trt or leave it out")
    if problems:
        raise UserError("; ".join(problems))
    return args
