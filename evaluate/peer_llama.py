"""llama.cpp on the teacher's own GGUF, as an outside yardstick (`--peer llama.cpp`).

Needs llama-cpp-python, which is no dependency: `pip install llama-cpp-python`. It takes one
sequence at a time; keys and values stay inside it, so a cache is the list of tokens seen so far and
what two calls have in common is not computed again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.artifact import UserError, read_json
from distill.builtin import BUILTIN, builtin_gguf
from evaluate.contenders import Contender, Lineup

CONTEXT = 2048
REMEDY = "install it with: pip install -c constraints.txt -e '.[peer]', or leave out --peer"


def llama_contender(lineup: Lineup) -> Contender:
    """The peer for a teacher that comes as a GGUF file.

    Raises: UserError when llama-cpp-python or the GGUF is missing.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(f"--peer llama.cpp: llama-cpp-python is not installed; {REMEDY}")
    path = gguf_of(lineup.teacher_source)
    cost = read_json(lineup.runs[0] / "student" / "manifest.json")["measured"]["teacher"]
    return Contender(
        id="llama.cpp/gguf",
        group="peer",
        run="llama.cpp",
        engine="llama.cpp",
        precision=path.stem.rpartition(".")[2] or "gguf",
        provider="cpu",
        directory=None,
        source=str(path),
        target_macs=cost["target_macs"],
        head_macs=cost["head_macs"],
        budget=1.0,
        macs_fraction=1.0,
        plan=None,
    )


def gguf_of(teacher_source: str) -> Path:
    """The GGUF file of a built-in teacher or of a .gguf path.

    Raises: UserError when the teacher is neither.
    """
    if teacher_source in BUILTIN:
        return builtin_gguf(teacher_source)
    path = Path(teacher_source)
    if path.suffix != ".gguf" or not path.is_file():
        raise UserError(
            f"--peer llama.cpp: {teacher_source} is no GGUF file; llama.cpp needs the teacher as "
            f".gguf or built in ({', '.join(BUILTIN)}); leave out --peer"
        )
    return path


class LlamaCache:
    """The tokens seen so far, of one row."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def select(self, rows: Sequence[int]) -> LlamaCache:
        if list(rows) != [0]:
            raise ValueError(f"rows {list(rows)} of a cache that holds one row")
        return LlamaCache(self.tokens)


class LlamaRunner:
    """llama.cpp behind the runners' interface; one row at a time."""

    max_batch = 1
    max_new = None

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        self._last = self._load(logits_all=False)
        self._all: Any = None
        self.vocabulary = int(self._last.n_vocab())
        self.max_context = CONTEXT

    def describe(self) -> dict[str, Any]:
        return {"engine": "llama.cpp", "provider": "cpu", "threads": self._threads}

    def new_cache(self, batch: int) -> LlamaCache:
        if batch != 1:
            raise ValueError(f"{batch} rows; llama.cpp takes one here")
        return LlamaCache()

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: LlamaCache,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        """Raises: ValueError for padding or more than one row."""
        if len(input_ids_BS) != 1 or (
            attention_mask_BT is not None and not attention_mask_BT.all()
        ):
            raise ValueError("one row without padding is needed")
        new = [int(token) for token in input_ids_BS[0]]
        keep = min(logits_to_keep or len(new), len(new))
        model = self._last if keep == 1 else self._with_all_logits()
        tokens = [*cache.tokens, *new]
        shared = min(_common(model.input_ids[: model.n_tokens], tokens), len(cache.tokens))
        model.n_tokens = shared
        model.eval(tokens[shared:])
        cache.tokens = tokens
        if keep == 1:
            return self._last_logits(model)[None, None]
        return np.array(model.scores[len(tokens) - keep : len(tokens)])[None]

    def close(self) -> None:
        for model in (self._last, self._all):
            if model is not None:
                model.close()

    def _last_logits(self, model: Any) -> np.ndarray:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).astype(np.float32)

    def _with_all_logits(self) -> Any:
        if self._all is None:
            self._all = self._load(logits_all=True)
        return self._all

    def _load(self, *, logits_all: bool) -> Any:
        import llama_cpp

        return llama_cpp.Llama(
            model_path=self._path,
            n_ctx=CONTEXT,
            n_batch=512,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            logits_all=logits_all,
            verbose=False,
        )


def open_llama(path: str, threads: int) -> LlamaRunner:
    """Load a GGUF file.

    Raises: UserError when llama-cpp-python is missing.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(f"llama-cpp-python is not installed; {REMEDY}")
    return LlamaRunner(path, threads)


def _common(a: np.ndarray, b: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = min(len(a), len(b))
    different = np.nonzero(np.asarray(a[:count]) != np.asarray(b[:count]))[0]
    return int(different[0]) if len(different) else count
