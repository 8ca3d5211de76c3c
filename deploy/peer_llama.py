"""llama.cpp behind the runners' interface, as a yardstick: one row, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distill.commit import UserError

BUILTIN = "smollm2-135m"
PROMPT_BATCH = 512


class LlamaCache:
    """Stands for the one cache that a llama.cpp context has; a newer one takes its place."""

    batch = 1

    def __init__(self) -> None:
        self.length = 0


class LlamaRunner:
    """What ``bench`` and ``evaluate`` need of `deploy.runner.Runner`; logits of the last position
    only unless it was opened with `all_logits`."""

    max_batch: int | None = 1
    max_new: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    cache_bytes_per_token = 0

    def __init__(self, model: Any, path: Path, threads: int, all_logits: bool) -> None:
        self._model: Any = model
        self._path, self._threads, self._all_logits = path, threads, all_logits
        self._cache: LlamaCache | None = None
        self.vocabulary = int(model.n_vocab())
        self.max_context = int(model.n_ctx())

    def describe(self) -> dict[str, Any]:
        import llama_cpp

        metadata = self._model.metadata
        named = [word for word in self._path.stem.split(".") if word.upper().startswith("Q")]
        return {
            "engine": "llama.cpp",
            "version": llama_cpp.__version__,
            "precision": named[-1] if named else metadata.get("general.file_type", "gguf"),
            "provider": "cpu",
            "threads": self._threads,
            "weight_bytes": self._path.stat().st_size,
            "directory": None,
        }

    def new_cache(self, batch: int) -> LlamaCache:
        if batch != 1:
            raise UserError(f"a batch of {batch}; llama.cpp is measured with one row; use -b 1")
        self._model.reset()
        self._cache = LlamaCache()
        return self._cache

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: LlamaCache,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """See `deploy.runner.Runner.forward`; padding is not possible with one row."""
        new = input_ids_BS.shape[1]
        keep = min(logits_to_keep or new, new)
        if cache is not self._cache:
            raise RuntimeError("a newer cache has taken this one's place")
        if cache.length + new > self.max_context:
            raise UserError(
                f"{cache.length + new} tokens of context; this llama.cpp was opened with "
                f"{self.max_context}; ask for fewer"
            )
        if keep > 1 and not self._all_logits:
            raise RuntimeError(f"logits of {keep} positions; opened for the last one's only")
        self._model.eval(input_ids_BS[0].tolist())
        cache.length += new
        if self._all_logits:
            return np.array(self._model.scores[cache.length - keep : cache.length])[None]
        return self._last_logits()

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = self._cache = None

    def _last_logits(self) -> np.ndarray:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        logits_V = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))
        return logits_V.astype(np.float32)[None, None]


def open_llama(
    gguf: str | None, *, threads: int, context: int, all_logits: bool = False
) -> LlamaRunner:
    """Open a GGUF file (None: the built-in SmolLM2-135M, fetched on first use).

    Raises: UserError when llama-cpp-python or the file is missing or damaged.
    """
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise UserError(
            f"llama_cpp cannot be imported ({error}); needs it for --peer llama.cpp; "
            "install it with: pip install llama-cpp-python"
        ) from None
    if gguf is None:
        from distill.builtin import builtin_gguf

        path = builtin_gguf(BUILTIN)
    else:
        path = Path(gguf)
    if not path.is_file():
        raise UserError(f"--gguf {path}: no such file; needs a GGUF model; name another")
    try:
        model = Llama(
            str(path),
            n_ctx=context,
            n_batch=PROMPT_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=all_logits,
            verbose=False,
        )
    except ValueError as error:
        raise UserError(f"{path} cannot be loaded ({error}); needs a GGUF model") from None
    return LlamaRunner(model, path, threads, all_logits)
