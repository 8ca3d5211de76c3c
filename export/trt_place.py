"""Where an engine is built: here, ahead of time for other GPUs, or by the device from a kit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from export.trt_api import BuildError, Flavour, installed, load_tensorrt
from export.trt_builder import FIRST_RELEASE, INTEGERS, release_of
from export.trt_targets import (
    AHEAD_OF_TIME,
    KNOWN,
    PARSER,
    check_precision,
    gpu_sm,
    lacking,
    split_targets,
)

# What the matmuls of a standard graph compute in: weights alone are int8 or int4, in plain ones
# beside fp16.
ACTIVATIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp32", "int4": "fp32"}


Graph = Literal["standard", "plain"]
NEWEST_OPERATOR = max(FIRST_RELEASE.values())


@dataclass(frozen=True)
class Place:
    """Where each target's engine is built: here by `flavour`, or on the device from a kit."""

    flavour: Flavour
    here: tuple[str, ...]
    kit: tuple[str, ...]


def graph_here(place: Place, precision: str) -> Graph:
    """Which graph an engine is built from here. TensorRT-RTX takes the standard one; TensorRT
    wants its own layout of integers, and before 10.15 plain operators."""
    if place.flavour == "tensorrt_rtx":
        return "standard"
    old = release_of(load_tensorrt("tensorrt")) < NEWEST_OPERATOR
    return "plain" if old or precision in INTEGERS else "standard"


def graph_of_kit(targets: Sequence[str], precision: str) -> Graph:
    """Which graph the TensorRT of all these devices can parse."""
    old = any(PARSER.get(target, NEWEST_OPERATOR) < NEWEST_OPERATOR for target in targets)
    return "plain" if old or precision in INTEGERS else "standard"


def choose_place(
    targets: Sequence[str] | None,
    precision: str,
    activations: str,
    flavour: Flavour | None = None,
) -> Place:
    """Decide what is built here, by what, and what needs a kit; nothing is decided in silence.

    Args:
        activations: "fp32", "fp16" or "bf16", in which the graph's matmuls compute.

    Raises: BuildError when a target is unknown or lacks the precision, or when `flavour` cannot
        build what is asked.
    """
    gpu = gpu_sm()
    if not targets:
        return _default_place(gpu, precision, activations, flavour)
    split = split_targets(targets)
    wanted = (*split.ahead_of_time, *split.on_device)
    if flavour == "tensorrt" or (flavour is None and wanted == (gpu,) and installed("tensorrt")):
        if wanted != (gpu,):
            raise BuildError(
                f"--target {','.join(wanted)} with TensorRT: it builds for the GPU here only "
                f"({gpu or 'there is none'}); leave --target out or use TensorRT-RTX"
            )
        check_precision(wanted, precision, activations, "tensorrt")
        return Place("tensorrt", wanted, ())
    check_precision(split.ahead_of_time, precision, activations, "tensorrt_rtx")
    check_precision(split.on_device, precision, activations, "tensorrt")
    return Place("tensorrt_rtx", split.ahead_of_time, split.on_device)


def _default_place(
    gpu: str | None, precision: str, activations: str, flavour: Flavour | None
) -> Place:
    if flavour == "tensorrt_rtx" or (gpu is None and flavour is None):
        able = (
            target
            for target in AHEAD_OF_TIME
            if not lacking(target, precision, activations, "tensorrt_rtx")
        )
        return Place("tensorrt_rtx", tuple(able), ())
    if gpu is None:
        raise BuildError(
            "TensorRT needs an NVIDIA GPU, and none answers here (libcuda.so.1); needs its driver; "
            "without one leave the choice to --target, which TensorRT-RTX builds ahead of time"
        )
    check_precision([gpu] if gpu in KNOWN else [], precision, activations, "tensorrt")
    if not installed("tensorrt"):
        raise BuildError(
            f"the GPU here is {gpu}, but the Python module tensorrt is missing; install it with: "
            "pip install -c constraints.txt -e '.[gpu]'; or name the GPUs to build for with "
            f"TensorRT-RTX: --target {','.join(AHEAD_OF_TIME)}"
        )
    return Place("tensorrt", (gpu,), ())
