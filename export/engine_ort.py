"""ONNX Runtime engine: the graph as the runtime optimises it, and the session settings beside it.

``session.json`` says how the directory is meant to be opened; ``export.session.OrtModel`` follows
it and refuses any other provider.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from distill.artifact import (
    MANIFEST,
    UserError,
    open_artifact,
    sha256_file,
    staged,
    write_json,
    write_manifest,
)
from export.graph_inplace import append_in_place
from export.ort_session import SessionSettings, load_onnxruntime, open_session
from export.session import MODEL, SESSION, OrtModel
from export.shared_data import share_equal_tensors

DATA = f"{MODEL}.data"
PROBE_TOKENS = 16
PROBE_BATCH = 2
REWRITES = {"cpu": ["cache in place"], "cuda": [], "tensorrt": []}
LARGEST_GROWTH = 1.1
LARGEST_DIFFERENCE = {"fp32": 1e-3, "int8": 1e-3, "int4": 1e-3, "fp16": 0.25, "bf16": 1.0}
FLOAT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level


def ort_settings(provider: str) -> dict[str, Any]:
    """Figures of the manifest that another engine must share to be as good as a new one."""
    return {
        "provider": provider,
        "onnxruntime": load_onnxruntime().__version__,
        "rewrites": REWRITES[provider],
    }


def build_ort_engine(
    onnx_directory: Path, directory: Path, *, provider: str, argv: Sequence[str]
) -> dict[str, Any]:
    """Write an "engine-ort" artefact for ``provider`` from an "onnx" artefact of the ort flavour.

    Returns the figures of its manifest: providers that run, load times in seconds with and
    without the optimisation, bytes, largest logit difference to the exported graph.
    Raises: UserError when the provider cannot run here, or when the optimised graph does not
        compute what the exported one does.
    """
    manifest = open_artifact(onnx_directory, "onnx")
    precision = str(manifest["measured"]["precision"])
    release = load_onnxruntime().__version__
    began = time.monotonic()
    with staged(directory) as partial:
        for file in sorted(onnx_directory.iterdir()):
            if file.is_file() and file.name not in (MANIFEST, MODEL, DATA):
                shutil.copy2(file, partial / file.name)
        level = _save_graph(onnx_directory, partial, provider)
        in_place = provider == "cpu" and append_in_place(partial / MODEL, release)
        write_json(
            partial / SESSION,
            {"provider": provider, "provider_options": {}, "graph_optimization_level": level},
        )
        measured = {
            **{key: manifest["measured"][key] for key in ("flavour", "precision", "parity")},
            **_compared(onnx_directory, partial, provider, precision),
            "optimised": level == "none",
            "cache_in_place": in_place,
            "weight_bytes": (partial / DATA).stat().st_size,
            **ort_settings(provider),
            "seconds": time.monotonic() - began,
        }
        parent = sha256_file(onnx_directory / MANIFEST)
        write_manifest(
            partial, kind="engine-ort", parent=parent, argv=list(argv),
            seed=int(manifest["seed"]), measured=measured,
        )  # fmt: skip
    return measured


def _save_graph(exported: Path, engine: Path, provider: str) -> str:
    """Write the optimised graph, or the exported one where optimising makes the weights grow: a
    processor without float16 arithmetic gets them widened to float32, better on loading.

    Returns the optimisation level at which the written graph is to be opened.
    """
    open_session(exported / MODEL, SessionSettings(provider), save_optimised=engine / MODEL)
    share_equal_tensors(engine / MODEL)
    if (engine / DATA).stat().st_size <= LARGEST_GROWTH * (exported / DATA).stat().st_size:
        return "none"
    for name in (MODEL, DATA):
        shutil.copy2(exported / name, engine / name)
    return "all"


def _compared(exported: Path, engine: Path, provider: str, precision: str) -> dict[str, Any]:
    """The engine against the exported graph: load seconds, largest difference of a logit."""
    allowed = LARGEST_DIFFERENCE[precision]
    before, unoptimised_s = _logits(exported, provider), _load_s(exported, provider)
    after, load_s = _logits(engine, provider), _load_s(engine, provider)
    difference = float(np.abs(after - before).max())
    if not difference <= allowed:
        version = load_onnxruntime().__version__
        raise UserError(
            f"the graph that ONNX Runtime {version} optimised for {provider} "
            f"differs from the exported one by {difference:.3g} in a logit (allowed {allowed}); "
            f"use {exported} as it is, or another --precision"
        )
    return {
        "load_s": load_s,
        "load_unoptimised_s": unoptimised_s,
        "max_logit_difference_to_onnx": difference,
    }


def _load_s(directory: Path, provider: str) -> float:
    began = time.perf_counter()
    OrtModel.open(directory, provider=provider, verify=False)
    return time.perf_counter() - began


def _logits(directory: Path, provider: str) -> np.ndarray:
    """Logits [B, 3, V] of fixed rows, one padded: a prompt, a piece behind it, a token behind both.

    Activations stay in floating point: rounded to int8, a difference in the last bit of one may
    move a logit by a hundredth of the largest.
    """
    model = OrtModel.open(
        directory, provider=provider, verify=False, graph=_without_rounding(directory / MODEL)
    )
    ids_S = np.arange(1, PROBE_TOKENS + 1) * (model.vocabulary // (2 * PROBE_TOKENS))
    ids_BS = np.stack([ids_S, ids_S[::-1]])[:PROBE_BATCH]
    mask_BS = np.ones_like(ids_BS)
    mask_BS[-1, : PROBE_TOKENS // 4] = 0
    positions_BS = np.maximum(mask_BS.cumsum(axis=1) - 1, 0)
    logits, past, done = [], None, 0
    for end in (PROBE_TOKENS // 2, PROBE_TOKENS - 1, PROBE_TOKENS):
        piece = slice(done, end)
        found, past = model.step(
            ids_BS[:, piece], mask_BS[:, :end], positions_BS[:, piece], past, logits_to_keep=1
        )
        logits.append(found.astype(np.float32))
        done = end
    return np.concatenate(logits, axis=1)


def _without_rounding(path: Path) -> bytes | None:
    """The graph with float activations; None: it has no others."""
    model = onnx.load(path, load_external_data=False)
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    for level in levels:
        level.i = FLOAT_ACTIVATIONS
    return model.SerializeToString() if levels else None
