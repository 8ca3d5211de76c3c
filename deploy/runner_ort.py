"""ONNX Runtime behind the runners' interface, on the CPU or a GPU.

On the CPU an engine appends to the cache in place. Any other graph takes the cache and gives back a
longer one (past + new): on the CPU `session.run` takes and gives NumPy arrays without a copy; on a
GPU the cache stays in device memory through IO binding.

Shapes: B batch, S new positions, P cached positions, T = P + S, K positions with logits,
V vocabulary, H key/value heads, D head dimension, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploy.engine_files import end_tokens, engine_precision, max_context, weight_bytes
from deploy.host_cache import HostCache
from deploy.huge_pages import use_huge_pages
from deploy.ort_binding import BoundStep
from deploy.ort_inplace import InPlaceStep
from deploy.runner import positions_of
from distill.artifact import UserError
from export.session import OrtModel


class OrtRunner:
    """A causal LM in ONNX Runtime."""

    max_batch: int | None = None
    max_new: int | None = None

    def __init__(self, model: OrtModel, threads: int | None = None) -> None:
        self.model: OrtModel | None = model
        self.directory = model.directory
        self.vocabulary = model.vocabulary
        self.max_context = max_context(model.config)
        self.eos_token_ids = end_tokens(model.directory, model.config)
        per_layer = 2 * model.kv_heads * model.head_dim
        self.cache_bytes_per_token = model.layers * per_layer * model.float_type.itemsize
        self._provider = model.provider
        options = model.session.get_session_options()
        self._threads = threads or options.intra_op_num_threads or None
        self._bound = _bound_step(model)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        spinning: bool = True,
        verify: bool = True,
    ) -> OrtRunner:
        """See `deploy.runner.open_runner`."""
        model = OrtModel.open(
            directory, provider=provider, threads=threads, spinning=spinning, verify=verify
        )
        if model.provider == "cpu":
            use_huge_pages()
        return cls(model, threads)

    def describe(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "precision": engine_precision(self.directory),
            "provider": self._provider,
            "threads": self._threads,
            "weight_bytes": weight_bytes(self.directory),
            "directory": str(self.directory),
        }

    def new_cache(self, batch: int) -> Any:
        if self._bound is not None:
            return self._bound.new_cache(batch)
        return HostCache(self._open_model().empty_cache(batch))

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: Any,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """See `deploy.runner.Runner.forward`."""
        model = self._open_model()
        batch, new = input_ids_BS.shape
        total = cache.length + new
        self._require_room(batch, cache.batch, total)
        if attention_mask_BT is None:
            attention_mask_BT = np.ones((batch, total), np.int64)
        if position_ids_BS is None:
            position_ids_BS = positions_of(attention_mask_BT, new)
        if self._bound is not None:
            return self._bound.step(
                input_ids_BS, cache, attention_mask_BT, position_ids_BS, logits_to_keep
            )
        logits_BKV, cache.values = model.step(
            input_ids_BS, attention_mask_BT, position_ids_BS, cache.values, logits_to_keep
        )
        return logits_BKV.astype(np.float32, copy=False)

    def close(self) -> None:
        self.model = self._bound = None

    def _open_model(self) -> OrtModel:
        if self.model is None:
            raise RuntimeError(f"{self.directory} was closed")
        return self.model

    def _require_room(self, batch: int, cached: int, total: int) -> None:
        if batch != cached:
            raise ValueError(f"{batch} rows of input for a cache of {cached} rows")
        if total > self.max_context:
            raise UserError(
                f"{total} tokens of context; {self.directory} allows {self.max_context}; "
                "shorten the prompt or ask for fewer tokens"
            )


def _bound_step(model: OrtModel) -> BoundStep | InPlaceStep | None:
    """How the cache stays where the engine has it; None: it comes and goes with every call."""
    if model.float_type == np.uint16:
        return None
    if model.provider != "cpu":
        return BoundStep(model, "cuda")
    return InPlaceStep(model) if model.is_in_place else None
