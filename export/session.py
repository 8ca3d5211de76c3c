"""An exported directory, opened in ONNX Runtime: numpy in, numpy out, no torch.

Shapes: B batch, S new tokens, P cached tokens, T = P + S, K positions with logits, V vocabulary,
H key/value heads, D head dimension, L layers. The cache is 2·L arrays [B, H, P, D] in the order
key 0, value 0, key 1, … . bfloat16, which numpy lacks, stands in uint16 arrays of the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.artifact import MANIFEST, UserError, open_artifact, read_json
from export.ort_session import (
    OPTIMISATIONS,
    PROVIDERS,
    REMEDY,
    SessionSettings,
    open_session,
    require_known,
)

MODEL = "model.onnx"
SESSION = "session.json"
NUMPY_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
}
KEEP = "logits_to_keep"
IN_PLACE = "cache_in_place"  # in the graph's metadata: past and present may be one buffer
KEEP_ALL = 2**31 - 1
INT64, BFLOAT16 = 7, 16  # as in onnx.TensorProto


class OrtModel:
    """A causal LM in ONNX Runtime, checked: files, inputs and outputs, provider."""

    def __init__(self, session: Any, config: dict[str, Any], directory: Path) -> None:
        self.session = session
        self.config = config
        self.directory = directory
        inputs = {item.name: item for item in session.get_inputs()}
        self.cache_inputs = [name for name in inputs if name.startswith("past_key_values.")]
        self._require_contract(inputs)
        cache = inputs[self.cache_inputs[0]]
        self.layers = len(self.cache_inputs) // 2
        self.kv_heads, self.head_dim = int(cache.shape[1]), int(cache.shape[3])
        self.vocabulary = int(config["vocab_size"])
        self.onnx_float_type: str = cache.type
        self.float_type = np.dtype(NUMPY_TYPES[cache.type])
        self.outputs = [item.name for item in session.get_outputs()]
        optional = [item.name for item in session.get_overridable_initializers()]
        self.is_in_place = IN_PLACE in session.get_modelmeta().custom_metadata_map
        self.has_logits_to_keep = KEEP in inputs or KEEP in optional

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        provider: str | None = None,
        threads: int | None = None,
        spinning: bool = True,
        verify: bool = True,
        graph: bytes | None = None,
    ) -> OrtModel:
        """Open an onnx or engine-ort directory.

        Args:
            provider: cpu | cuda | tensorrt; None: that of session.json, without one cpu.
            threads: intra-op threads; None: that of session.json, without one the cores.
            verify: compare every file with the sha256 in manifest.json, if there is one.
            graph: a serialised model to run in place of the file's, with the file's weights.
        Raises: UserError when a file is missing, damaged or outside the directory, when the graph
            is not one of ours, or when the provider cannot run it.
        """
        directory = Path(directory)
        if verify and (directory / MANIFEST).is_file():
            open_artifact(directory)
        settings = _settings(directory, provider, threads, spinning)
        config = read_json(directory / "config.json")
        if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
            raise UserError(f"{directory / 'config.json'} has no vocab_size; {REMEDY}")
        return cls(open_session(directory / MODEL, settings, graph=graph), config, directory)

    @property
    def provider(self) -> str:
        """The provider that runs: cpu | cuda | tensorrt."""
        first = self.session.get_providers()[0]
        return next(name for name, full in PROVIDERS.items() if full == first)

    def empty_cache(self, batch: int) -> list[np.ndarray]:
        """2·L arrays [batch, H, 0, D]."""
        shape = (batch, self.kv_heads, 0, self.head_dim)
        return [np.zeros(shape, self.float_type) for _ in self.cache_inputs]

    def step(
        self,
        input_ids_BS: np.ndarray,
        attention_mask_BT: np.ndarray,
        position_ids_BS: np.ndarray,
        past: Sequence[np.ndarray] | None = None,
        logits_to_keep: int | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """One forward pass: (logits_BKV, cache of 2·L arrays [B, H, T, D]).

        Args:
            past: what the previous step returned; None: nothing is cached.
            logits_to_keep: how many last positions get logits, K; None: all, K = S.
        Logits come in the graph's float type, bfloat16 as float32.
        """
        feed = self.feed(input_ids_BS, attention_mask_BT, position_ids_BS, past, logits_to_keep)
        run = self._run_bfloat16 if self.float_type == np.uint16 else self._run
        logits_BKV, *present = run(feed)
        if logits_to_keep is not None:
            logits_BKV = logits_BKV[:, -logits_to_keep:]
        return logits_BKV, present

    def feed(
        self,
        input_ids_BS: np.ndarray,
        attention_mask_BT: np.ndarray,
        position_ids_BS: np.ndarray,
        past: Sequence[np.ndarray] | None = None,
        logits_to_keep: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The session's inputs by name; see `step`."""
        cache = self.empty_cache(len(input_ids_BS)) if past is None else past
        feed = {
            "input_ids": np.ascontiguousarray(input_ids_BS, dtype=np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask_BT, dtype=np.int64),
            "position_ids": np.ascontiguousarray(position_ids_BS, dtype=np.int64),
            **dict(zip(self.cache_inputs, cache, strict=True)),
        }
        if self.has_logits_to_keep and logits_to_keep is not None:
            feed[KEEP] = np.array([logits_to_keep], dtype=np.int64)
        return feed

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.session.run(self.outputs, feed))

    def _run_bfloat16(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run with bfloat16 carried as bits, which `session.run` cannot take or give."""
        from onnxruntime import OrtValue

        batch, sequence = feed["input_ids"].shape
        total = feed["attention_mask"].shape[1]
        kept = min(sequence, int(feed[KEEP][0])) if KEEP in feed else sequence
        cache_shape = (batch, self.kv_heads, total, self.head_dim)
        binding = self.session.io_binding()
        for name, array in feed.items():
            bits = np.ascontiguousarray(array)
            kind = BFLOAT16 if array.dtype == np.uint16 else INT64
            value = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)
            binding.bind_ortvalue_input(name, value)
        results = []
        for name in self.outputs:
            shape = (batch, kept, self.vocabulary) if name == "logits" else cache_shape
            results.append(np.empty(shape, np.uint16))
            binding.bind_output(name, "cpu", 0, BFLOAT16, shape, results[-1].ctypes.data)
        self.session.run_with_iobinding(binding)
        results[0] = (results[0].astype(np.uint32) << 16).view(np.float32)
        return results

    def _require_contract(self, inputs: Mapping[str, Any]) -> None:
        layers = len(self.cache_inputs) // 2
        parts = ("key", "value")
        cache = [f"past_key_values.{n}.{part}" for n in range(layers) for part in parts]
        wanted = {"input_ids", "attention_mask", "position_ids", *cache}
        present = [f"present.{n}.{part}" for n in range(layers) for part in parts]
        found = [item.name for item in self.session.get_outputs()]
        sizes = inputs[cache[0]].shape if cache and cache[0] in inputs else []
        if (
            not layers
            or set(inputs) - {KEEP} != wanted
            or found != ["logits", *present]
            or any(inputs[name].type not in NUMPY_TYPES for name in cache)
            or not all(isinstance(sizes[axis], int) for axis in (1, 3))
        ):
            raise UserError(
                f"{self.directory / MODEL} takes {', '.join(list(inputs)[:5])} … and gives "
                f"{', '.join(found[:3])} …; needs input_ids, attention_mask, position_ids and "
                f"past_key_values.N.key/value to logits and present.N.key/value; {REMEDY}"
            )
        self.cache_inputs = cache


def _settings(
    directory: Path, provider: str | None, threads: int | None, spinning: bool
) -> SessionSettings:
    """What session.json records, if there is one, with the caller's wishes before it."""
    path = directory / SESSION
    if not path.is_file():
        require_known(provider or "cpu")
        return SessionSettings(provider or "cpu", {}, _threads(threads), spinning)
    saved = read_json(path)
    built_for = saved.get("provider") if isinstance(saved, dict) else None
    if built_for not in PROVIDERS:
        raise UserError(f"{path} names the provider {built_for!r}; {REMEDY}")
    if provider not in (None, built_for):
        raise UserError(
            f"{directory} was built for the {built_for} provider, asked for is {provider}; build "
            f"that with: python -m export --run RUN --engine ort --provider {provider}"
        )
    level = saved.get("graph_optimization_level", "all")
    if level not in OPTIMISATIONS:
        raise UserError(f"{path} has graph_optimization_level {level!r}; {REMEDY}")
    wanted = threads if threads is not None else saved.get("threads")
    options = saved.get("provider_options") or {}
    return SessionSettings(built_for, options, _threads(wanted), spinning, level)


def _threads(threads: Any) -> int | None:
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UserError(f"threads is {threads!r}; allowed is a whole number from 1; give another")
    return threads
