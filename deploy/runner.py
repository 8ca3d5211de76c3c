"""One small interface over every engine: token ids and a cache in, float32 logits out.

No torch and no transformers: an engine's own package, numpy and the artefact contract are enough.

Shapes: B batch, S new positions, T cached and new positions, K positions with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.artifact import MANIFEST, UserError

__all__ = ["Cache", "Runner", "open_runner", "positions_of"]


class Cache(Protocol):
    """Keys and values of the positions seen so far, padding included, for each row of a batch.

    The cache does not know which columns are padding: whoever pads keeps the attention mask.
    `Runner.forward` and `replace` change the cache. `compact` and `extend` use it up: go on with
    what they return, which may be the same one, changed. Every other method leaves it as it is and
    returns another one.
    """

    @property
    def batch(self) -> int: ...

    @property
    def length(self) -> int:
        """Columns: positions of every row, padding included."""
        ...

    def select(self, rows: Sequence[int]) -> Cache:
        """These rows in this order; a row may be left out, or repeated to share a prefix."""
        ...

    def compact(self, rows: Sequence[int], columns: int) -> Cache:
        """Only these rows, in ascending order, without their first `columns` columns; `self` is
        used up."""
        ...

    def extend(self, other: Cache) -> Cache:
        """As `concat`; `self` is used up."""
        ...

    def concat(self, other: Cache) -> Cache:
        """The rows of `self`, then those of `other`; the shorter one gets zero columns on the left
        (pad its attention mask alike)."""
        ...

    def replace(self, rows: Sequence[int], other: Cache) -> None:
        """Put the rows of `other`, which is not longer, into the places `rows`, with zero columns
        on their left: rows join without a copy of all that is cached."""
        ...

    def pad_left(self, columns: int) -> Cache:
        """`columns` more columns of zeros on the left, for the attention mask to hide."""
        ...

    def shift(self, columns: int) -> Cache:
        """As `pad_left`; `self` is used up."""
        ...

    def trim_left(self, columns: int) -> Cache:
        """Without the first `columns` columns (padding of every row, or what scrolls out)."""
        ...

    def truncate(self, length: int) -> Cache:
        """Only the first `length` columns: the last tokens are taken back."""
        ...


class Runner(Protocol):
    """An engine that is ready to run. One thread at a time may call it."""

    @property
    def vocabulary(self) -> int:
        """Logits of a position. May exceed the tokenizer's ids: the rest is never sampled."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens of one row, prompt and answer together."""
        ...

    @property
    def max_batch(self) -> int | None:
        """Most rows of one call; None: memory is the only limit."""
        ...

    @property
    def max_new(self) -> int | None:
        """Most new positions of one call, so that a longer prompt needs several; None: no limit."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, of generation_config.json; may be empty."""
        ...

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one column of one row takes."""
        ...

    def describe(self) -> dict[str, Any]:
        """engine, version, precision, provider, threads, weight_bytes, directory."""
        ...

    def new_cache(self, batch: int) -> Any:
        """An empty cache of `batch` rows."""
        ...

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: Any,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """Compute S new positions of every row, append them to `cache` in place.

        Args:
            attention_mask_BT: 1 real, 0 padding, over cached and new columns; None: all real.
            position_ids_BS: place of each new token among its row's real ones; None: from the mask.
            logits_to_keep: how many last positions get logits; None: all of them, K = S.
        Returns: float32 logits [B, K, V], the caller's own until the next call at least.
        Raises: UserError for sizes beyond the engine's limits.
        """
        ...

    def close(self) -> None:
        """Give back memory and device buffers; the runner cannot be used any more."""
        ...


def open_runner(
    directory: Path,
    *,
    provider: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
    verify: bool = True,
) -> Runner:
    """Open an engine-ort, onnx or engine-trt directory.

    Args:
        provider: cpu | cuda | tensorrt for ONNX Runtime; None: what the engine was built for.
        threads: threads of the CPU provider; None: one for each physical core.
        spinning: idle threads wait busily: quicker for one stream, wasteful beside a server.
        verify: compare every file with its sha256 in manifest.json first.
    Raises: UserError when the directory holds no engine, a damaged one, or one that this machine
        cannot run.
    """
    directory = Path(directory)
    if (directory / "model.onnx").is_file() and not (directory / "kit.json").is_file():
        from deploy.runner_ort import OrtRunner

        return OrtRunner.open(
            directory, provider=provider, threads=threads, spinning=spinning, verify=verify
        )
    if any((directory / name).is_file() for name in ("model.engine", "build.json", "kit.json")):
        from deploy.runner_trt import TrtRunner

        return TrtRunner.open(directory, verify=verify)
    raise UserError(_not_an_engine(directory))


def positions_of(attention_mask_BT: np.ndarray, new: int) -> np.ndarray:
    """Position ids int64 [B, new] of the last columns: real tokens before each, never below 0."""
    before_BT = np.cumsum(attention_mask_BT, axis=1, dtype=np.int64) - 1
    return np.maximum(before_BT[:, attention_mask_BT.shape[1] - new :], 0)


def _not_an_engine(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} does not exist; needs an engine directory; {REMEDY}"
    if (directory / "model.safetensors").is_file() or list(directory.glob("model-*.safetensors")):
        return f"{directory} is a student, not an engine; needs one that was exported; {REMEDY}"
    kind = "an artefact without a graph" if (directory / MANIFEST).is_file() else "no artefact"
    return f"{directory} is {kind}; needs model.onnx or model.engine in it; {REMEDY}"


REMEDY = "write one with: python -m export --run RUN --engine ort"
