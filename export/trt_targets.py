"""GPU generations: which engines are built ahead of time, and which only on the device itself.

Standard library only: a build kit carries this file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from export.trt_api import BuildError, Flavour

# Compute capability: GPUs. TensorRT-RTX 1.7 builds these without a GPU, several into one engine.
AHEAD_OF_TIME = {
    "sm75": "Turing: RTX 20, T4",
    "sm80": "Ampere: A100, A30",
    "sm86": "Ampere: RTX 30, A10, A40",
    "sm89": "Ada: RTX 40, L4, L40",
    "sm120": "Blackwell: RTX 50, RTX PRO",
    "sm121": "Blackwell: GB10 (DGX Spark)",
}
ON_DEVICE = {
    "sm87": "Jetson Orin",
    "sm90": "Hopper: H100, H200, GH200",
    "sm100": "Blackwell: B200, GB200",
    "sm103": "Blackwell: B300, GB300",
    "sm110": "Jetson Thor",
}
PARSER = {"sm87": (10, 3), "sm110": (10, 13)}  # TensorRT that JetPack 6 and JetPack 7 bring
KNOWN = {**AHEAD_OF_TIME, **ON_DEVICE}
AMPERE = 80

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True)
class Split:
    """Targets by the way in which they are built."""

    ahead_of_time: tuple[str, ...]
    on_device: tuple[str, ...]


def split_targets(targets: Sequence[str]) -> Split:
    """Sort targets into two groups, each in the order of `KNOWN`, doubles dropped.

    Raises: BuildError naming every target that is not known.
    """
    wanted = {target.strip().lower().replace("_", "").replace(".", "") for target in targets}
    unknown = sorted(wanted - KNOWN.keys())
    if unknown or not wanted:
        raise BuildError(
            f"--target {','.join(unknown) or '(empty)'}: no such GPU generation; choose from "
            f"{','.join(AHEAD_OF_TIME)} (built here) and {','.join(ON_DEVICE)} (a kit that the "
            "device builds)"
        )
    return Split(
        tuple(target for target in AHEAD_OF_TIME if target in wanted),
        tuple(target for target in ON_DEVICE if target in wanted),
    )


def lacking(target: str, precision: str, activations: str, flavour: Flavour) -> str | None:
    """Why an engine of this precision cannot be built for a target; None where it can.

    Args:
        activations: type of what the matmuls compute in: "fp32", "fp16" or "bf16".
    """
    turing = int(target[2:]) < AMPERE
    if turing and activations == "bf16":
        return "has no bfloat16"
    if turing and flavour == "tensorrt_rtx" and (activations != "fp16" or precision == "int4"):
        return f"gets no {precision} with {activations} activations from TensorRT-RTX"
    return None


def check_precision(
    targets: Sequence[str], precision: str, activations: str, flavour: Flavour
) -> None:
    """Raise BuildError naming the targets for which this precision cannot be built."""
    reasons = {t: lacking(t, precision, activations, flavour) for t in targets}
    refused = [target for target, reason in reasons.items() if reason]
    if refused:
        raise BuildError(
            f"--precision {precision} with --target {','.join(refused)}: {KNOWN[refused[0]]} "
            f"{reasons[refused[0]]}; use --precision fp16 or targets from sm{AMPERE} on"
        )


def gpu_sm(ordinal: int = 0) -> str | None:
    """Compute capability of this machine's GPU, such as "sm89"; None without a usable one.

    Asks the CUDA driver directly, so neither torch nor a CUDA toolkit is needed.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), ordinal),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    return None if any(asked) else f"sm{major.value}{minor.value}"
