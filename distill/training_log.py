"""A run's training log: log.jsonl and TensorBoard written, and read back whatever a kill left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from distill.artifact import UserError, atomic_write_text


class TrainingLog:
    """log.jsonl and TensorBoard events; lines beyond the resumed step are dropped."""

    def __init__(self, directory: Path, start: int, is_main: bool) -> None:
        self.file = None
        if not is_main:
            return
        path = directory / "log.jsonl"
        kept = [line for line in _records(path) if line["step"] <= start]
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, tokens: int, measured: dict[str, float]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, "tokens": tokens, **measured}) + "\n")
        self.file.flush()
        for name, value in measured.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()


def read_training_log(jsonl_path: Path) -> list[dict[str, Any]]:
    """Records of a training log by rising step; each with `step` and `tokens`.

    Lines cut short by a kill are skipped. A step logged again after resuming replaces the earlier
    one and all after it; several lines of one step are merged.

    Raises: UserError when the file cannot be read.
    """
    try:
        lines = Path(jsonl_path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{jsonl_path} cannot be read: {error.strerror}; needs the JSONL log of a training "
            "run; train first with: python -m distill --budget F"
        ) from error
    records: list[dict[str, Any]] = []
    for line in lines:
        record = _record(line)
        if record is None:
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        if records and records[-1]["step"] == record["step"]:
            records[-1].update(record)
        else:
            records.append(record)
    return records


def _records(path: Path) -> list[dict[str, Any]]:
    return read_training_log(path) if path.exists() else []


def is_number(value: Any) -> bool:
    """A finite number."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _record(line: bytes) -> dict[str, Any] | None:
    """The line's record, or None when it is torn, no object, or lacks step and tokens."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return record if all(is_number(record.get(k)) for k in ("step", "tokens")) else None
