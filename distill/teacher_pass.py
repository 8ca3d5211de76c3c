"""The teacher's block outputs: computed as training goes, or once and read from disk ever after.

Shape legend: N sequences, L blocks, B batch, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.artifact import UserError, read_json, write_json
from distill.statistics import decoder_layers


class TeacherPass(Protocol):
    """Where training gets the teacher's outputs from."""

    def blocks(self, rows: np.ndarray) -> list[Tensor]:
        """Outputs of the decoder blocks for the given sequences, all or the last few: tensors
        (B, T, D)."""


@contextmanager
def recorded_blocks(model: PreTrainedModel, last: int = 0) -> Iterator[list[Tensor]]:
    """A list that every forward pass within fills with its block outputs, of all blocks (0) or
    the ``last`` ones; clear it in between."""
    outputs: list[Tensor] = []

    def record(module: object, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handles = [layer.register_forward_hook(record) for layer in decoder_layers(model)[-last:]]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class LiveTeacher:
    """Runs the teacher on the sequences that are asked for and keeps the outputs of its last
    ``blocks`` blocks."""

    def __init__(self, model: PreTrainedModel, ids_NT: np.ndarray, blocks: int) -> None:
        self.model, self.ids_NT, self.kept = model, ids_NT, blocks

    @torch.no_grad()
    def blocks(self, rows: np.ndarray) -> list[Tensor]:
        ids_BT = torch.from_numpy(self.ids_NT[rows].astype(np.int64)).to(self.model.device)
        with recorded_blocks(self.model, self.kept) as outputs:
            self.model.model(input_ids=ids_BT, use_cache=False)
            return list(outputs)


class CachedTeacher:
    """Outputs of the last L blocks in bfloat16 on disk: 2·L·D bytes a token, read a batch at a
    time."""

    def __init__(self, path: Path, blocks: int, seq_len: int, hidden: int) -> None:
        self.path, self.shape = path, (blocks, seq_len, hidden)
        self.row_bytes = 2 * blocks * seq_len * hidden

    def blocks(self, rows: np.ndarray) -> list[Tensor]:
        with self.path.open("rb") as file:
            stack = torch.stack([self._row(file, int(row)) for row in rows])
        return [stack[:, block] for block in range(self.shape[0])]

    def _row(self, file: object, row: int) -> Tensor:
        file.seek(row * self.row_bytes)  # type: ignore[attr-defined]
        raw = bytearray(file.read(self.row_bytes))  # type: ignore[attr-defined]
        return torch.frombuffer(raw, dtype=torch.bfloat16).view(self.shape)


def cache_bytes(model: PreTrainedModel, tokens: int, blocks: int) -> int:
    return 2 * blocks * model.config.hidden_size * tokens


def cache_key(fingerprint: str, ids_NT: np.ndarray) -> str:
    """Names a cache by the teacher's weights and the exact sequences."""
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(str(ids_NT.shape).encode() + np.ascontiguousarray(ids_NT).tobytes())
    return digest.hexdigest()[:16]


def open_cache(
    model: PreTrainedModel, ids_NT: np.ndarray, directory: Path, blocks: int
) -> CachedTeacher:
    """The cache in ``directory``, finished or not; see ``write_cache``."""
    path = directory / "blocks.bf16"
    return CachedTeacher(path, blocks, ids_NT.shape[1], model.config.hidden_size)


def write_cache(
    model: PreTrainedModel,
    ids_NT: np.ndarray,
    directory: Path,
    *,
    blocks: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> CachedTeacher:
    """Fill ``directory`` with the outputs of the teacher's last ``blocks`` blocks for ``ids_NT``;
    goes on where it was stopped.

    Rows are appended and synced before ``rows.json`` counts them, so a killed run repeats at most
    16 batches.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count, seq_len = ids_NT.shape
    cache = open_cache(model, ids_NT, directory, blocks)
    done_path = directory / "rows.json"
    done = _rows_done(done_path)
    if not cache.path.exists() or cache.path.stat().st_size < done * cache.row_bytes:
        done = 0
    advance(done * seq_len)
    live = LiveTeacher(model, ids_NT, blocks)
    with cache.path.open("r+b" if done else "wb") as file:
        file.seek(done * cache.row_bytes)
        for batch, start in enumerate(range(done, count, batch_size)):
            rows = np.arange(start, min(start + batch_size, count))
            stack = torch.stack(live.blocks(rows), dim=1).to(torch.bfloat16)
            file.write(stack.view(torch.int16).cpu().numpy().tobytes())
            advance(len(rows) * seq_len)
            if batch % 16 == 15 or rows[-1] == count - 1:
                file.flush()
                os.fsync(file.fileno())
                write_json(done_path, {"rows": int(rows[-1]) + 1, "of": count})
    return cache


def _rows_done(path: Path) -> int:
    """How many rows were written whole; 0 where nothing readable says so."""
    with suppress(UserError, KeyError, TypeError, ValueError):
        return int(read_json(path)["rows"])
    return 0
