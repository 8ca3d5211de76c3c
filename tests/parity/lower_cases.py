"""Tiny students of every family and mix of decisions, and how a lowered graph of one is run.

Shapes: B batch, S new tokens, P cached tokens, T = P + S, V vocabulary, E out, R rank, D in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.modeling_budgeted import (
    PROJECTIONS,
    FactoredLinear,
    RemovedLinear,
    apply_structure,
)
from distill.plan import Decision, Plan
from distill.student_format import narrow_widths, save_student
from export.lower import Flavour, lower, save_onnx
from tests.conftest import build_tiny_model

RANK = 12
REMOVED: dict[str, tuple[str, ...]] = {
    "keep": (),
    "factored": (),
    "narrow": (),
    "outputs removed": ("0.self_attn.o_proj", "1.mlp.down_proj", "2.self_attn.o_proj"),
    "inputs removed": ("0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.gate_proj"),
    "values removed": ("0.mlp.up_proj", "1.self_attn.v_proj", "2.mlp.down_proj"),
    "layer removed": ("1.self_attn.o_proj", "1.mlp.down_proj", "2.self_attn.v_proj"),
}
MIXES = tuple(REMOVED)
WIDTHS = {"model.layers.0.mlp": 96, "model.layers.2.mlp": 40}  # above and below the hidden size


def widths_of(mix: str) -> dict[str, int]:
    """MLP -> neurons of one mix; an MLP of factored pairs lies between two narrow ones."""
    return WIDTHS if mix == "narrow" else {}


def ranks_of(mix: str, layers: int = 3) -> dict[str, int]:
    """Module -> rank of one mix; in the mixed ones every other module is factored."""
    if mix == "keep":
        return {}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    names = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    modules = [f"{layer}.{name}" for layer in range(layers) for name in names]
    chosen = modules if mix in ("factored", "narrow") else modules[::2]
    ranks = {f"model.layers.{name}": RANK for name in chosen}
    ranks |= {f"model.layers.{name}": 0 for name in REMOVED[mix]}
    return {name: rank for name, rank in ranks.items() if block_of(name) not in widths_of(mix)}


def block_of(module: str) -> str:
    """ "model.layers.0.mlp.up_proj" -> "model.layers.0.mlp"."""
    return module.rpartition(".")[0]


def student_model(
    family: str, mix: str, *, biased: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A random student; `biased` gives a bias to every module that can have one."""
    extra: dict[str, Any] = {}
    if biased and family != "qwen2":
        extra["attention_bias"] = True
    if biased and family == "llama":
        extra["mlp_bias"] = True
    model = build_tiny_model(family, **{**extra, **overrides})
    apply_structure(model, ranks_of(mix, model.config.num_hidden_layers), widths_of(mix))
    randomise(model)
    return model.eval()


def randomise(model: PreTrainedModel, std: float = 0.2) -> None:
    """Random weights for what `apply_structure` has made of a tiny model."""
    generator = torch.Generator().manual_seed(3)
    narrow = {f"{block}.{leaf}" for block in narrow_widths(model) for leaf in PROJECTIONS}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            module.down.weight.data.normal_(std=std, generator=generator)
            module.up.weight.data.normal_(std=std, generator=generator)
        elif name in narrow:
            module.weight.data.normal_(std=std, generator=generator)


def plan_of(model: PreTrainedModel) -> Plan:
    """The plan that describes a model as it stands."""
    decisions, neurons = [], model.config.intermediate_size
    kind: tuple[Any, int, int]
    for name, module in model.named_modules():
        if ".layers." not in name or not name.endswith("_proj"):
            continue
        wide, out = module.in_features, module.out_features
        reads = name.endswith("down_proj")
        width = wide if reads else out
        if isinstance(module, FactoredLinear):
            kind = ("approximate", module.rank, module.rank * (wide + out))
        elif isinstance(module, RemovedLinear):
            kind = ("remove", 0, 0)
        elif ".mlp." in name and width < neurons:
            kind = ("narrow", width, wide * out)
            wide, out = (neurons, out) if reads else (wide, neurons)
        else:
            kind = ("keep", min(wide, out), wide * out)
        decisions.append(Decision(name, *kind, out, wide, "test"))
    return Plan(0.5, "budgeted", "test", 4, tuple(decisions))


def save_case(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write `model` as a student directory without a manifest."""
    plan = plan_of(model)
    directory.mkdir(parents=True)
    save_student(directory, model, tokenizer, plan.ranks, plan.widths)
    plan.save(directory / "plan.json")
    return directory


class Cases:
    """`cases("qwen3", "factored", biased=True, …)`: a student and its directory, made once, for
    reading only."""

    def __init__(self, folders: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folders, self._tokenizer = folders, tokenizer
        self._made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def __call__(self, family: str, mix: str, **options: Any) -> tuple[PreTrainedModel, Path]:
        key = repr((family, mix, sorted(options.items())))
        if key not in self._made:
            model = student_model(family, mix, **options)
            folder = self._folders.mktemp("student") / "student"
            self._made[key] = model, save_case(folder, model, self._tokenizer)
        return self._made[key]

    def directory(self, family: str, mix: str, **options: Any) -> Path:
        return self(family, mix, **options)[1]


class Lowered:
    """One lowered graph in ONNX Runtime on the CPU."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            directory / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.past_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past")]
        self.float_type = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[
            self.past_inputs[0].type
        ]

    def empty(self, batch: int) -> list[np.ndarray]:
        return [
            np.zeros((batch, i.shape[1], 0, i.shape[3]), self.float_type) for i in self.past_inputs
        ]

    def step(
        self,
        ids_BS: np.ndarray,
        mask_BT: np.ndarray | None = None,
        positions_BS: np.ndarray | None = None,
        past: Sequence[np.ndarray] | None = None,
        keep: int | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [B, K, V] in float32 and the grown cache."""
        past = self.empty(len(ids_BS)) if past is None else past
        before = past[0].shape[2]
        total = before + ids_BS.shape[1]
        if mask_BT is None:
            mask_BT = np.ones((len(ids_BS), total), np.int64)
        if positions_BS is None:
            positions_BS = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)[:, before:]
        feed: dict[str, Any] = {
            "input_ids": ids_BS,
            "attention_mask": mask_BT,
            "position_ids": positions_BS,
            **{i.name: array for i, array in zip(self.past_inputs, past, strict=True)},
        }
        if keep is not None:
            feed["logits_to_keep"] = np.array([keep], np.int64)
        logits, *present = self.session.run(None, feed)
        return logits.astype(np.float32), present

    def in_steps(
        self, ids_BS: np.ndarray, mask_BS: np.ndarray | None, lengths: Sequence[int]
    ) -> np.ndarray:
        """Logits of every position, the tokens being fed in pieces of these lengths."""
        mask_BS = np.ones_like(ids_BS) if mask_BS is None else mask_BS
        cache, done, pieces = None, 0, []
        for length in lengths:
            upto = done + length
            logits, cache = self.step(ids_BS[:, done:upto], mask_BS[:, :upto], past=cache)
            pieces.append(logits)
            done = upto
        assert done == ids_BS.shape[1]
        return np.concatenate(pieces, axis=1)


def lowered(student: Path, directory: Path, flavour: Flavour, **options: Any) -> Lowered:
    """Lower, save and open one student."""
    directory.mkdir(parents=True, exist_ok=True)
    save_onnx(lower(student, flavour=flavour, **{"precision": "fp32", **options}), directory)
    return Lowered(directory)


def torch_logits(
    model: nn.Module, ids_BS: np.ndarray, mask_BS: np.ndarray | None = None
) -> np.ndarray:
    """Logits of one pass without a cache."""
    mask_BS = np.ones_like(ids_BS) if mask_BS is None else mask_BS
    positions_BS = np.maximum(np.cumsum(mask_BS, axis=1) - 1, 0)
    inputs: Mapping[str, torch.Tensor] = {
        "input_ids": torch.from_numpy(ids_BS),
        "attention_mask": torch.from_numpy(mask_BS),
        "position_ids": torch.from_numpy(positions_BS),
    }
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float().numpy()


def greedy_tokens(model: nn.Module, prompt: Sequence[int], new: int) -> list[int]:
    """The prompt and the `new` tokens that PyTorch finds likeliest, one after another."""
    ids = list(prompt)
    for _ in range(new):
        logits_1SV = torch_logits(model, np.array([ids]))
        ids.append(int(logits_1SV[0, -1].argmax()))
    return ids


def truncated_model(dense: PreTrainedModel, rank: int = 416) -> PreTrainedModel:
    """A real model whose MLPs are cut to `rank`: cheap to make, and it still writes text."""
    model = dense.float()
    ranks = {
        name: rank
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".mlp." in name
    }
    whole = {name: model.get_submodule(name).weight.data for name in ranks}
    apply_structure(model, ranks)
    for name, weight_ED in whole.items():
        left, values, right = torch.linalg.svd(weight_ED, full_matrices=False)
        module: Any = model.get_submodule(name)
        module.up.weight.data = left[:, :rank] * values[:rank]
        module.down.weight.data = right[:rank].contiguous()
    return model.eval()
