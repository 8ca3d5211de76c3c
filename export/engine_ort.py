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

from distill.artifact import (
    MANIFEST,
    UserError,
    open_artifact,
    sha256_file,
    staged,
    write_json,
    write_manifest,
)
from export.ort_session import SessionSettings, load_onnxruntime, open_session
from export.session import MODEL, SESSION, OrtModel
from export.shared_data import share_equal_tensors

DATA = f"{MODEL}.data"
PROBE_TOKENS = 16
LARGEST_GROWTH = 1.1
LARGEST_DIFFERENCE = {"fp32": 1e-3, "int8": 1e-2, "int4": 1e-2, "fp16": 0.25, "bf16": 1.0}


def ort_settings(provider: str) -> dict[str, Any]:
    """Figures of the manifest that another engine must share to be as good as a new one."""
    return {"provider": provider, "onnxruntime": load_onnxruntime().__version__}


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
    began = time.monotonic()
    with staged(directory) as partial:
        for file in sorted(onnx_directory.iterdir()):
            if file.is_file() and file.name not in (MANIFEST, MODEL, DATA):
                shutil.copy2(file, partial / file.name)
        level = _save_graph(onnx_directory, partial, provider)
        write_json(
            partial / SESSION,
            {"provider": provider, "provider_options": {}, "graph_optimization_level": level},
        )
        measured = {
            **{key: manifest["measured"][key] for key in ("flavour", "precision", "parity")},
            **_compared(onnx_directory, partial, provider, precision),
            "optimised": level == "none",
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
    """The engine against the exported graph: providers, load seconds, logit difference."""
    allowed = LARGEST_DIFFERENCE[precision]
    before, unoptimised_s = _logits(exported, provider)
    after, load_s = _logits(engine, provider)
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


def _logits(directory: Path, provider: str) -> tuple[np.ndarray, float]:
    """Logits of a fixed prompt, and the seconds that opening the directory took."""
    began = time.perf_counter()
    model = OrtModel.open(directory, provider=provider, verify=False)
    opened_s = time.perf_counter() - began
    ids_1S = np.arange(1, PROBE_TOKENS + 1)[None] * (model.vocabulary // (2 * PROBE_TOKENS))
    positions_1S = np.arange(PROBE_TOKENS)[None]
    logits, _ = model.step(ids_1S, np.ones_like(ids_1S), positions_1S)
    return logits.astype(np.float32), opened_s
