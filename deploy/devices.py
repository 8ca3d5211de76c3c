"""Devices that engines are made for, and the decode speed that each can reach at best.

Figures are those of the makers' data sheets. Nothing here was run on any of these devices: every
speed is a prediction, and a ceiling, not an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.ceilings import work_of
from distill.commit import UserError

GIB = 2**30
JETPACK_6 = "TensorRT 10.x of JetPack 6, built on the device"
JETPACK_7 = "TensorRT 10.x of JetPack 7, built on the device"
AHEAD = "TensorRT-RTX 1.x built ahead of time, or TensorRT 10 or 11 on the device"
ON_DEVICE = "TensorRT 10 or 11, built on the device"
PREDICTED = ("fp16", "int8", "int4")
BASIS = "prediction: memory bandwidth of the data sheet ÷ bytes of weights; never run on it"


@dataclass(frozen=True)
class Device:
    """A device by its data sheet: compute capability, memory (shared with the CPU on Jetson and
    Spark), bandwidth in 10⁹ bytes a second, the TensorRT that runs on it, and the CPU's machine
    name as `platform.machine()` gives it."""

    key: str
    name: str
    sm: str
    memory_gib: float
    bandwidth_gb_per_s: float
    tensorrt: str
    machine: str = "x86_64"


DEVICES = {
    device.key: device
    for device in (
        Device("orin-nano", "Jetson Orin Nano 8 GB", "sm87", 8, 68, JETPACK_6, "aarch64"),
        Device(
            "orin-nano-super", "Jetson Orin Nano Super 8 GB", "sm87", 8, 102, JETPACK_6, "aarch64"
        ),
        Device("orin-nx", "Jetson Orin NX 16 GB", "sm87", 16, 102.4, JETPACK_6, "aarch64"),
        Device("agx-orin", "Jetson AGX Orin 64 GB", "sm87", 64, 204.8, JETPACK_6, "aarch64"),
        Device("thor", "Jetson AGX Thor", "sm110", 128, 273, JETPACK_7, "aarch64"),
        Device("dgx-spark", "DGX Spark (GB10)", "sm121", 128, 273, AHEAD, "aarch64"),
        Device("rtx-3060", "GeForce RTX 3060 12 GB", "sm86", 12, 360, AHEAD),
        Device("rtx-3090", "GeForce RTX 3090", "sm86", 24, 936, AHEAD),
        Device("rtx-4060", "GeForce RTX 4060", "sm89", 8, 272, AHEAD),
        Device("rtx-4090", "GeForce RTX 4090", "sm89", 24, 1008, AHEAD),
        Device("rtx-5070", "GeForce RTX 5070", "sm120", 12, 672, AHEAD),
        Device("rtx-5090", "GeForce RTX 5090", "sm120", 32, 1792, AHEAD),
        Device("l4", "L4", "sm89", 24, 300, AHEAD),
        Device("a10", "A10", "sm86", 24, 600, AHEAD),
        Device("h100", "H100 SXM 80 GB", "sm90", 80, 3350, ON_DEVICE),
    )
}


@dataclass(frozen=True)
class Prediction:
    """Best decode speed of one stream on a device (never measured there)."""

    device: Device
    precision: str
    weight_bytes: float
    tokens_per_s: float

    @property
    def fits(self) -> bool:
        """Whether the weights take less than half of the memory."""
        return self.weight_bytes < 0.5 * self.device.memory_gib * GIB

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device.key,
            "precision": self.precision,
            "weight_bytes": round(self.weight_bytes),
            "decode_ceiling_tokens_per_s": round(self.tokens_per_s, 1),
            "fits": self.fits,
            "basis": BASIS,
        }


def device_named(key: str) -> Device:
    """Raises: UserError naming the devices that are known."""
    if key not in DEVICES:
        raise UserError(
            f"device {key!r} is not known; allowed are {', '.join(DEVICES)}; choose one of them"
        )
    return DEVICES[key]


def predictions(
    directory: Path,
    devices: Sequence[Device] = tuple(DEVICES.values()),
    precisions: Sequence[str] = PREDICTED,
) -> list[Prediction]:
    """Decode ceilings of the student in `directory` (any precision's), from its plan.

    Raises: UserError when the directory carries no plan.
    """
    found = []
    for precision in precisions:
        work = work_of(directory, precision)
        if work is None:
            raise UserError(
                f"{directory} has no plan.json and config.json; needs both to count its weights; "
                "write it again with: python -m export --run RUN --overwrite"
            )
        for device in devices:
            rate = 1e9 * device.bandwidth_gb_per_s / work.weight_bytes
            found.append(Prediction(device, precision, work.weight_bytes, rate))
    return sorted(found, key=lambda p: list(DEVICES).index(p.device.key))
