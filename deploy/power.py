"""Power mode and clocks of the machine, and whether they are fixed: on a Jetson they decide."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

TIMEOUT_S = 20
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
GPU_FIELDS = ("name", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def read_power() -> dict[str, Any]:
    """What the machine tells; a key is missing where it tells nothing.

    nvpmodel: the power mode. clocks: what jetson_clocks shows. governor: of the first CPU core.
    gpus: one dictionary each, from nvidia-smi.
    """
    state: dict[str, Any] = {}
    if mode := _output("nvpmodel", "-q"):
        state["nvpmodel"] = " ".join(mode.split())
    if clocks := _output("jetson_clocks", "--show"):
        state["clocks"] = [line.strip() for line in clocks.splitlines() if line.strip()]
    query = ("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    if rows := _output(*query):
        split = (row.split(", ") for row in rows.strip().splitlines())
        state["gpus"] = [dict(zip(GPU_FIELDS, row, strict=False)) for row in split]
    if GOVERNOR.is_file():
        state["governor"] = GOVERNOR.read_text().strip()
    return state


def warnings_of(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why figures measured between two readings cannot be repeated; empty: nothing known."""
    found = []
    if "nvpmodel" in before and before["nvpmodel"] != after.get("nvpmodel"):
        found.append(
            f"the power mode changed from {before['nvpmodel']} to {after.get('nvpmodel')} "
            "meanwhile; measure again"
        )
    moving = [name for line in before.get("clocks", ()) if (name := _moving(line))]
    if moving:
        found.append(
            f"clocks are not fixed ({', '.join(moving)}); fix them with: sudo jetson_clocks"
        )
    if "nvpmodel" in before and "clocks" not in before:
        found.append("clocks cannot be read; run as root, or fix them with: sudo jetson_clocks")
    return found


def _moving(line: str) -> str | None:
    """The name of a clock whose limits differ, from a line such as
    "cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 …"."""
    values = dict(re.findall(r"(\w+)=(\d+)", line))
    name = re.split(r"[:\s]", line, maxsplit=1)[0]
    if values.get("Online") == "0" or values.get("FreqOverride") == "1":
        return None
    if "MinFreq" not in values or "MaxFreq" not in values:
        return None
    return name if values["MinFreq"] != values["MaxFreq"] else None


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
