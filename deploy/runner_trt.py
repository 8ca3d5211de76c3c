"""TensorRT 10, 11 or TensorRT-RTX behind the runners' interface.

Tested against a fake of `deploy.cuda` and of TensorRT's runtime: never run on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploy.cuda import Cuda, CudaRuntime
from deploy.engine_files import end_tokens, max_context, weight_bytes
from deploy.runner import positions_of
from deploy.trt_cache import Layout, TrtCache
from deploy.trt_step import NUMPY_TYPES, TrtStep
from distill.artifact import MANIFEST, UserError, open_artifact, read_json
from export.trt_api import PRODUCT, BuildError, load_tensorrt, quiet_logger
from export.trt_check import check_engine, read_record
from export.trt_record import ENGINE
from export.trt_targets import gpu_sm


class TrtRunner:
    """A causal LM in TensorRT."""

    def __init__(
        self,
        directory: Path,
        record: Mapping[str, Any],
        contexts: Mapping[str, Any],
        cuda: Cuda,
    ) -> None:
        """`contexts`: an execution context for each profile of `record` (build.json)."""
        config = read_json(directory / "config.json")
        limits = record["limits"]
        cache_inputs = [t for t in record["inputs"] if t["name"].startswith("past_key_values.")]
        shape, dtype = cache_inputs[0]["shape"], NUMPY_TYPES[cache_inputs[0]["dtype"]]
        self.directory, self._record, self._cuda = directory, record, cuda
        self._layout = Layout(len(cache_inputs), int(shape[1]), int(shape[3]), np.dtype(dtype))
        self.vocabulary = int(config["vocab_size"])
        self.max_context = min(max_context(config), int(limits["max_past"]))
        self.max_batch: int | None = int(limits["max_batch"])
        self.max_new: int | None = int(limits["max_seq"])
        self.eos_token_ids = end_tokens(directory, config)
        self.cache_bytes_per_token = len(cache_inputs) * self._layout.size_bytes(1, 1)
        self._step: TrtStep | None = TrtStep(contexts, record, cuda, self.vocabulary)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> TrtRunner:
        """See `deploy.runner.open_runner`. The engine itself is always compared with its hash.

        Raises: UserError when the engine is damaged, TensorRT or cuda-python is missing, no GPU
            answers, or the engine is for another GPU or release.
        """
        directory = Path(directory)
        if verify and (directory / MANIFEST).is_file():
            open_artifact(directory)
        flavour = read_record(directory)["flavour"]
        try:
            trt = load_tensorrt(flavour)
        except BuildError as error:
            raise UserError(str(error)) from None
        here = gpu_sm()
        if here is None:
            raise UserError(
                f"{directory} needs an NVIDIA GPU, and none answers here (libcuda.so.1); in a "
                "container add --gpus all (Jetson: --runtime nvidia), or choose another --engine"
            )
        record = check_engine(directory, here, trt.__version__, flavour=flavour)
        return cls(directory, record, _contexts(trt, directory, record), CudaRuntime())

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self._record["flavour"],
            "version": self._record["version"],
            "precision": self._record["precision"],
            "provider": "cuda",
            "threads": None,
            "weight_bytes": weight_bytes(self.directory),
            "directory": str(self.directory),
        }

    def new_cache(self, batch: int) -> TrtCache:
        self._require_batch(batch)
        return TrtCache(self._cuda, self._open_step().stream, self._layout, batch)

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: TrtCache,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """See `deploy.runner.Runner.forward`. More new positions than one call of the engine takes
        are run in several."""
        step = self._open_step()
        batch, new = input_ids_BS.shape
        past, keep = cache.length, min(logits_to_keep or new, new)
        self._require_room(batch, cache.batch, past + new, keep)
        if attention_mask_BT is None:
            attention_mask_BT = np.ones((batch, past + new), np.int64)
        if position_ids_BS is None:
            position_ids_BS = positions_of(attention_mask_BT, new)
        if new == 1 and past:
            return step.decode(input_ids_BS, cache, attention_mask_BT, position_ids_BS)
        pieces, width = [], self.max_new or new
        for start in range(0, new, width):
            end = min(start + width, new)
            kept = end - max(start, new - keep)  # not above 0: logits that nobody asked for
            logits_BKV = step.prefill(
                input_ids_BS[:, start:end],
                cache,
                attention_mask_BT[:, : past + end],
                position_ids_BS[:, start:end],
                max(kept, 1),
            )
            if kept > 0:
                pieces.append(logits_BKV)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def close(self) -> None:
        self._step = None

    def _open_step(self) -> TrtStep:
        if self._step is None:
            raise RuntimeError(f"{self.directory} was closed")
        return self._step

    def _require_batch(self, batch: int) -> None:
        if self.max_batch is not None and batch > self.max_batch:
            raise UserError(
                f"a batch of {batch}; {self.directory} was built for {self.max_batch} at most; "
                "use less, or build again with: python -m export --run RUN --engine trt --max-batch"
            )

    def _require_room(self, batch: int, cached: int, total: int, keep: int) -> None:
        self._require_batch(batch)
        if batch != cached:
            raise ValueError(f"{batch} rows of input for a cache of {cached} rows")
        if total > self.max_context:
            raise UserError(
                f"{total} tokens of context; {self.directory} allows {self.max_context}; shorten "
                "the prompt, or build again with: python -m export --run RUN --engine trt "
                "--max-past"
            )
        if self._record["logits"] == "last" and keep > 1:
            raise UserError(
                f"logits of {keep} positions; {self.directory} gives the last one's only; build "
                "again with the default logits: python -m export --run RUN --engine trt --overwrite"
            )


def _contexts(trt: Any, directory: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The engine in device memory, with one execution context a profile."""
    logger = quiet_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((directory / ENGINE).read_bytes())
    contexts = (
        {} if engine is None else {n: engine.create_execution_context() for n in record["profiles"]}
    )
    if not contexts or None in contexts.values():
        reason = logger.errors[0] if logger.errors else "it gave no reason"
        raise UserError(
            f"{PRODUCT[record['flavour']]} cannot load {directory / ENGINE} ({reason}); needs "
            "enough free device memory and the GPU that it was built for; close other programs"
        )
    return contexts
