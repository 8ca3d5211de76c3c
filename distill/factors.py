"""The calibration stage: S and G of every target module, factored, on disk, for every budget.

Layers are taken in groups so that moments and factors in memory stay below a bound: with 4 bytes an
entry, a 7B Llama (hidden 4096, intermediate 11008) holds, per layer, S of 3·4096² + 11008² and G of
5·4096² + 2·11008² entries, 2.0 GB in all; the default of 8 GiB takes groups of 4 layers, 8.0 GB.
Beside the bfloat16 model (13.5 GB) that leaves either the graph of 2 × 512 tokens (130 kB a token
and layer, 4.4 GB) or one module's float64 work (3.6 GB) with a layer's factors and their copy on
the way to disk (2.1 GB): below 28 GiB of host memory, and with a float32 model (27 GB, a graph of
7.5 GB) below 44 GiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.artifact import open_artifact, staged, write_manifest
from distill.console import progress
from distill.data import TokenSet
from distill.lowrank import Factors, break_even_rank, metric_root, two_sided_svd
from distill.neurons import rank_neurons
from distill.plan import NEURON_READER, Module
from distill.sharding import whole
from distill.statistics import Moments, decoder_layers, gather_moments, layer_groups
from distill.teacher import target_modules

KIND = "factors"
ENERGIES = "energies.safetensors"


@dataclass(frozen=True)
class FactorStore:
    """Factors of every target module, read one at a time; energies are held in memory.

    ``neurons``: by MLP, what each neuron is worth, as in ``NeuronRanking``; empty where the store
    was made without gradients.
    """

    directory: Path
    modules: tuple[Module, ...]
    neurons: Mapping[str, np.ndarray]

    def load(self, name: str) -> Factors:
        """Factors of one module, up to the highest rank that a plan may use."""
        with safe_open(self.directory / _layer_file(name), framework="pt") as stored:
            up, down = (stored.get_tensor(f"{name}.{part}") for part in ("up", "down"))
        energy = next(m.energy_K for m in self.modules if m.name == name)
        return Factors(up, down, torch.from_numpy(energy))

    def neuron_order(self, block: str) -> Tensor:
        """The neurons of one MLP, the last to go first: int64 (M,)."""
        return self._neurons(block, "order")

    def neuron_moment(self, block: str) -> Tensor:
        """E[h hᵀ] over what the down_proj of one MLP reads: float32 (M, M)."""
        return self._neurons(block, "moment")

    def _neurons(self, block: str, part: str) -> Tensor:
        with safe_open(self.directory / _layer_file(block), framework="pt") as stored:
            return stored.get_tensor(f"{block}.{part}")

    def gradient_moment(self, name: str) -> Tensor | None:
        """G of one module (O, O), damped; None where the store was made without."""
        with safe_open(self.directory / _layer_file(name), framework="pt") as stored:
            if f"{name}.metric" not in stored.keys():
                return None
            root_OO = stored.get_tensor(f"{name}.metric").float()
        return root_OO @ root_OO.T


def store_bytes(model: PreTrainedModel) -> int:
    """Bytes of a store of ``model`` on disk, energies and headers aside."""
    total = 0
    for name, linear in target_modules(model).items():
        out_features, in_features = linear.weight.shape
        pair = break_even_rank(out_features, in_features) * (out_features + in_features)
        moment = in_features**2 if name.endswith(NEURON_READER) else 0
        total += 4 * (pair + moment) + 2 * out_features**2
    return total


def factors_key(fingerprint: str, data: TokenSet, whitening: str, answer_weight: float) -> str:
    """Names a store by the weights, the calibration text and the metric."""
    digest = hashlib.sha256(f"4|{fingerprint}|{whitening}|{answer_weight}".encode())
    digest.update(np.ascontiguousarray(data.ids_NT).tobytes())
    return digest.hexdigest()[:16]


def factor_model(
    model: PreTrainedModel,
    data: TokenSet,
    directory: Path,
    *,
    whitening: str,
    memory_bytes: int,
    micro_batch: int,
    answer_weight: float,
    seed: int,
) -> FactorStore:
    """Gather and factor by groups of layers; commits ``directory`` when all are done.

    ``whitening`` is "two-sided", or "input" for the classical competitor (SVD-LLM).
    """
    groups = layer_groups(decoder_layers(model), memory_bytes)
    tokens = data.ids_NT.size
    energies: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    with staged(directory) as partial:
        for index, group in enumerate(groups):
            title = f"statistics {index + 1}/{len(groups)}" if len(groups) > 1 else "statistics"
            with progress(tokens, title) as bar:
                moments = gather_moments(
                    model, data, group, batch_size=micro_batch, seed=seed,
                    answer_weight=answer_weight, advance=bar.update,
                )  # fmt: skip
            with progress(len(moments), "factoring", unit="modules") as bar:
                for layer in group:
                    names = [n for n in moments if f".layers.{layer}." in n]
                    stored: dict[str, torch.Tensor] = {}
                    for name in names:
                        linear = model.get_submodule(name)
                        assert isinstance(linear, nn.Linear)
                        moment, weight_OI = moments.pop(name), whole(linear.weight)
                        factors = _factor(weight_OI, moment, whitening)
                        rank = break_even_rank(*weight_OI.shape)
                        if whitening == "two-sided":
                            stored[f"{name}.metric"] = metric_root(moment.gradient_OO)
                            if name.endswith(NEURON_READER):
                                block = name.rpartition(".")[0]
                                energies[block] = _rank(weight_OI, moment, block, stored)
                        stored[f"{name}.up"] = factors.up_OK[:, :rank].contiguous().cpu()
                        stored[f"{name}.down"] = factors.down_KI[:rank].contiguous().cpu()
                        energies[name] = factors.energy_K.cpu()
                        shapes[name] = (linear.out_features, linear.in_features)
                        bar.update(1)
                    save_file(stored, partial / f"layer-{layer}.safetensors")
        save_file(energies, partial / ENERGIES)
        write_manifest(
            partial, kind=KIND, parent=None, argv=[], seed=seed,
            measured={"tokens": tokens, "whitening": whitening, "shapes": shapes},
        )  # fmt: skip
    return open_factors(directory)


def lend_layers(
    model: PreTrainedModel,
    data: TokenSet,
    *,
    memory_bytes: int,
    micro_batch: int,
    answer_weight: float,
    seed: int,
) -> None:
    """Take part in another process's ``factor_model`` of a sharded model and keep nothing."""
    for group in layer_groups(decoder_layers(model), memory_bytes):
        moments = gather_moments(
            model, data, group, batch_size=micro_batch, seed=seed, answer_weight=answer_weight
        )
        names = list(moments)
        del moments
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            whole(linear.weight)


def open_factors(directory: Path) -> FactorStore:
    """A finished store; raises UserError when a file is missing or altered."""
    shapes = open_artifact(directory, KIND)["measured"]["shapes"]
    with safe_open(directory / ENERGIES, framework="np") as stored:
        modules = tuple(Module(n, o, i, stored.get_tensor(n)) for n, (o, i) in shapes.items())
        neurons = {n: stored.get_tensor(n) for n in stored.keys() if n not in shapes}
    return FactorStore(directory, modules, neurons)


def _factor(weight_OI: Tensor, moments: Moments, whitening: str) -> Factors:
    gradient_OO = moments.gradient_OO if whitening == "two-sided" else None
    return two_sided_svd(weight_OI, moments.input_II, gradient_OO)


def _rank(weight_OM: Tensor, moments: Moments, block: str, stored: dict[str, Tensor]) -> Tensor:
    """What each neuron of one MLP is worth; its order and second moments go to ``stored``."""
    ranking = rank_neurons(weight_OM, moments.input_II, moments.gradient_OO)
    stored[f"{block}.order"] = ranking.order_M.contiguous().cpu()
    stored[f"{block}.moment"] = moments.input_II.contiguous().cpu()
    return ranking.energy_M.contiguous().cpu()


def _layer_file(name: str) -> str:
    return f"layer-{name.split('.')[2]}.safetensors"
