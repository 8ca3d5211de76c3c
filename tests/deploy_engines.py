"""Tiny exported engines for tests of the runtime, each with the PyTorch model it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.artifact import read_json, write_json, write_manifest
from distill.modeling_budgeted import apply_structure
from export.files import copy_companions
from export.graph_inplace import append_in_place
from export.lower import lower, save_onnx
from export.quantize import quantize
from tests.conftest import build_tiny_model
from tests.parity.lower_cases import randomise, save_case

RANK = 32  # a multiple of the blocks of int4 and int8
RANKS = {
    "model.layers.0.self_attn.q_proj": RANK,
    "model.layers.1.mlp.gate_proj": RANK,
    "model.layers.1.mlp.up_proj": RANK,
    "model.layers.1.self_attn.o_proj": 0,
    "model.layers.2.mlp.down_proj": RANK,
}
WIDTHS = {"model.layers.0.mlp": 2 * RANK}


def tiny_student(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A random student with kept, narrow, factored and removed modules."""
    model = build_tiny_model(family, **overrides)
    apply_structure(model, RANKS, WIDTHS)
    randomise(model)
    return model.eval()


class Engines:
    """Engine directories of one student, written when they are first asked for.

    They lie as in a run folder: ``run/onnx/ort-fp32``, ``run/engine-ort/int8-cpu``, …
    """

    def __init__(
        self,
        run: Path,
        tokenizer: PreTrainedTokenizerBase,
        family: str = "llama",
        **overrides: Any,
    ) -> None:
        self.run = run
        self.model = tiny_student(family, **overrides)
        self.student = save_case(run / "student", self.model, tokenizer)

    def onnx(self, precision: str = "fp32", flavour: str = "ort") -> Path:
        directory = self.run / "onnx" / f"{flavour}-{precision}"
        if directory.is_dir():
            return directory
        if precision in ("int8", "int4"):
            source = self.onnx("fp32", flavour)
            directory.mkdir(parents=True)
            quantize(source, directory, precision, method="nearest", show_progress=False)
        else:
            directory.mkdir(parents=True)
            graph = lower(self.student, flavour=flavour, precision=precision)  # type: ignore[arg-type]
            save_onnx(graph, directory)
            copy_companions(self.student, directory)
        _seal(directory, "onnx", flavour, precision)
        return directory

    def engine(self, precision: str = "fp32") -> Path:
        """An engine-ort directory: the ONNX one with the settings of a session."""
        directory = self.run / "engine-ort" / f"{precision}-cpu"
        if not directory.is_dir():
            source = self.onnx(precision)
            directory.mkdir(parents=True)
            for path in source.iterdir():
                if path.name != "manifest.json":
                    (directory / path.name).write_bytes(path.read_bytes())
            write_json(directory / "session.json", {"provider": "cpu", "provider_options": {}})
            _seal(directory, "engine-ort", "ort", precision)
        return directory

    def in_place(self, precision: str = "fp32") -> Path:
        """The engine as `build_ort_engine` leaves it: it appends to the cache in place."""
        directory = self.run / "engine-ort" / f"{precision}-in-place"
        if not directory.is_dir():
            shutil.copytree(self.engine(precision), directory)
            assert append_in_place(directory / "model.onnx", onnxruntime.__version__)
            _seal(directory, "engine-ort", "ort", precision, cache_in_place=True)
        return directory


def greedy_by_torch(model: PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """The model's own greedy continuation, computed without a cache."""
    ids_1S = torch.tensor([list(ids)])
    with torch.no_grad():
        for _ in range(count):
            next_11 = model(ids_1S).logits[:, -1:].argmax(-1)
            ids_1S = torch.cat([ids_1S, next_11], dim=1)
    return ids_1S[0, len(ids) :].tolist()


def greedy_by_runner(runner: Any, ids: Sequence[int], count: int) -> list[int]:
    cache, tokens = runner.new_cache(1), []
    step_BS = np.asarray([list(ids)], np.int64)
    for _ in range(count):
        logits_B1V = runner.forward(step_BS, cache, logits_to_keep=1)
        tokens.append(int(logits_B1V[0, -1].argmax()))
        step_BS = np.array([[tokens[-1]]], np.int64)
    return tokens


def set_config(directory: Path, name: str = "config.json", **values: Any) -> None:
    """Change entries of a JSON file of a directory."""
    path = directory / name
    content = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def _seal(directory: Path, kind: str, flavour: str, precision: str, **measured: Any) -> None:
    measured = {"flavour": flavour, "precision": precision, **measured}
    write_manifest(directory, kind=kind, parent=None, argv=["test"], seed=0, measured=measured)
