"""The machine: what it is, how busy it is, and the power mode it runs in."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from distill.artifact import library_versions

NVIDIA_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks_throttle_reasons.active",
    "power.limit",
    "temperature.gpu",
    "memory.total",
)
MODE_FIELDS = ("nvpmodel", "jetson_clocks", "governor", "power.limit")
BUSY_INTERVAL_S = 1.0
VECTOR_UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")


def describe_machine() -> dict[str, Any]:
    """Processor, memory, system and library versions."""
    return {
        "processor": _processor(),
        "vector_units": _vector_units(),
        "logical_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def power_state() -> dict[str, Any]:
    """Power mode, clocks, temperature, and how busy others keep the processor while this waits;
    keys are missing where the machine tells nothing."""
    state: dict[str, Any] = {}
    if text := _output("nvpmodel", "-q"):
        state["nvpmodel"] = " ".join(text.split())
    if text := _output("jetson_clocks", "--show"):
        state["jetson_clocks"] = text.strip()[:400]
    query = ("nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader")
    if text := _output(*query):
        rows = [line.split(", ") for line in text.strip().splitlines()]
        state["gpus"] = [dict(zip(NVIDIA_FIELDS, row, strict=False)) for row in rows]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        state["governor"] = governor.read_text().strip()
    if temperature := _temperature():
        state["temperature_c"] = temperature
    state["busy_percent"] = psutil.cpu_percent(interval=BUSY_INTERVAL_S)
    return state


def mode_of(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a power state that two measurements must share to be compared."""
    gpus = [{k: gpu.get(k) for k in MODE_FIELDS if k in gpu} for gpu in state.get("gpus", [])]
    mode: dict[str, Any] = {k: state[k] for k in MODE_FIELDS[:3] if k in state}
    return {**mode, "gpus": gpus} if gpus else mode


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _temperature() -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    found = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            found.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    return max(found, default=None)


def _processor() -> str:
    names = [v for k, v in _cpuinfo() if k == "model name"]
    model = Path("/proc/device-tree/model")
    board = model.read_text(errors="replace").strip("\0\n ") if model.is_file() else ""
    return " · ".join(x for x in ((names or [platform.processor()])[0], board) if x)


def _vector_units() -> list[str]:
    flags = next((v for k, v in _cpuinfo() if k in ("flags", "Features")), "").split()
    return [unit for unit in VECTOR_UNITS if unit in flags]


def _cpuinfo() -> list[tuple[str, str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in lines)]
