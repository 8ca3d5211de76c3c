"""What an engine directory says of itself: precision, bytes, context, end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.artifact import MANIFEST, UserError, read_json

WEIGHT_FILES = ("model.onnx*", "*.engine")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
UNLIMITED = 2**31 - 1


def weight_bytes(directory: Path) -> int:
    """Bytes of graph and weights on disk."""
    files = {path for pattern in WEIGHT_FILES for path in Path(directory).glob(pattern)}
    return sum(path.stat().st_size for path in files)


def engine_precision(directory: Path) -> str:
    """fp32 | fp16 | bf16 | int8 | int4, from the manifest; without one from the folder's name."""
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        measured = read_json(directory / MANIFEST).get("measured", {})
        if measured.get("precision") in PRECISIONS:
            return str(measured["precision"])
    words = directory.name.split("-")
    return next((precision for precision in PRECISIONS if precision in words), "fp32")


def max_context(config: Mapping[str, Any]) -> int:
    """Most positions of a sequence."""
    limit = config.get("max_position_embeddings")
    return int(limit) if isinstance(limit, int) and limit > 0 else UNLIMITED


def end_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer: generation_config.json's, else config.json's.

    Raises: UserError when they are no token ids.
    """
    path = Path(directory) / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    found = settings.get("eos_token_id") if isinstance(settings, dict) else None
    if found is None:
        path, found = Path(directory) / "config.json", config.get("eos_token_id")
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise UserError(
            f"{path} has eos_token_id {found!r}; needs token ids; "
            "export the student again with: python -m export --run RUN --overwrite"
        )
    return tuple(dict.fromkeys(tokens))
