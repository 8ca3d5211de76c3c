"""The calibration stage: S and G of every target module, factored, on disk, for every budget.

A store has one of three forms. "pair": the factors of every target module in the metric of inputs
and output gradients. "narrow": those of attention's, and of every MLP the order of its neurons with
the second moments of what down_proj reads. "svd", the classical competitor: all factors, in the
metric of inputs alone.

Layers are taken in groups so that moments and factors in memory stay below a bound: with 4 bytes an
entry, a 7B Llama (hidden 4096, intermediate 11008) holds, per layer, S of 3·4096² + 11008² and G of
5·4096² + 2·11008² entries, 2.0 GB in all; the default of 8 GiB takes groups of 4 layers, 8.0 GB.
For "narrow" S is of 2·4096² + 11008² and G of 5·4096² entries, 0.95 GB, in groups of 8 layers.
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
from distill.plan import NEURON_READER, NEURON_WRITERS, Module
from distill.sharding import whole
from distill.statistics import Moments, decoder_layers, gather_moments, layer_groups
from distill.teacher import target_modules

KIND = "factors"
ENERGIES = "energies.safetensors"


@dataclass(frozen=True)
class FactorStore:
    """What one model was factored into, read one module at a time; energies are held in memory.

    ``neurons``: by MLP, what each neuron is worth, as in ``NeuronRanking``; the modules of such an
    MLP have no factors, and no energies. ``form``: "narrow", "pair" or "svd".
    """

    directory: Path
    form: str
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

    def gradient_moment(self, name: str) -> Tensor:
        """G of one module that has factors (O, O), damped; "svd" has none."""
        with safe_open(self.directory / _layer_file(name), framework="pt") as stored:
            root_OO = stored.get_tensor(f"{name}.metric").float()
        return root_OO @ root_OO.T


def store_bytes(model: PreTrainedModel, form: str) -> int:
    """Bytes of a store of ``model`` on disk, energies and headers aside."""
    total = 0
    for name, linear in target_modules(model).items():
        out_features, in_features = linear.weight.shape
        if name.endswith(_unmeasured(form)):
            continue
        if _ranks_neurons(name, form):
            total += 4 * in_features**2
            continue
        total += 4 * break_even_rank(out_features, in_features) * (out_features + in_features)
        total += 0 if form == "svd" else 2 * out_features**2
    return total


def _unmeasured(form: str) -> tuple[str, ...]:
    """Modules that follow from another's statistics: a narrowed MLP's writers from its reader's."""
    return NEURON_WRITERS if form == "narrow" else ()


def _ranks_neurons(name: str, form: str) -> bool:
    return form == "narrow" and name.endswith(NEURON_READER)


def factors_key(fingerprint: str, data: TokenSet, form: str, answer_weight: float) -> str:
    """Names a store by the weights, the calibration text and the form."""
    digest = hashlib.sha256(f"5|{fingerprint}|{form}|{answer_weight}".encode())
    digest.update(np.ascontiguousarray(data.ids_NT).tobytes())
    return digest.hexdigest()[:16]


def factor_model(
    model: PreTrainedModel,
    data: TokenSet,
    directory: Path,
    *,
    form: str,
    memory_bytes: int,
    micro_batch: int,
    answer_weight: float,
    seed: int,
) -> FactorStore:
    """Gather and factor by groups of layers; commits ``directory`` when all are done.

    ``form`` is "narrow", "pair" or "svd" (see above).
    """
    groups = layer_groups(decoder_layers(model), memory_bytes, _unmeasured(form))
    tokens = data.ids_NT.size
    energies: dict[str, torch.Tensor] = {}
    with staged(directory) as partial:
        for index, group in enumerate(groups):
            title = f"statistics {index + 1}/{len(groups)}" if len(groups) > 1 else "statistics"
            with progress(tokens, title) as bar:
                moments = gather_moments(
                    model, data, group, batch_size=micro_batch, seed=seed,
                    answer_weight=answer_weight, unmeasured=_unmeasured(form), advance=bar.update,
                )  # fmt: skip
            with progress(len(moments), "factoring", unit="modules") as bar:
                for layer in group:
                    stored: dict[str, torch.Tensor] = {}
                    for name in [n for n in moments if f".layers.{layer}." in n]:
                        linear = model.get_submodule(name)
                        assert isinstance(linear, nn.Linear)
                        weight_OI = whole(linear.weight)
                        _factor(name, weight_OI, moments.pop(name), form, stored, energies)
                        bar.update(1)
                    save_file(stored, partial / f"layer-{layer}.safetensors")
        save_file(energies, partial / ENERGIES)
        linears = target_modules(model).items()
        shapes = {name: (m.out_features, m.in_features) for name, m in linears}
        write_manifest(
            partial, kind=KIND, parent=None, argv=[], seed=seed,
            measured={"tokens": tokens, "form": form, "shapes": shapes},
        )  # fmt: skip
    return open_factors(directory)


def lend_layers(
    model: PreTrainedModel,
    data: TokenSet,
    *,
    form: str,
    memory_bytes: int,
    micro_batch: int,
    answer_weight: float,
    seed: int,
) -> None:
    """Take part in another process's ``factor_model`` of a sharded model and keep nothing."""
    for group in layer_groups(decoder_layers(model), memory_bytes, _unmeasured(form)):
        moments = gather_moments(
            model, data, group, batch_size=micro_batch, seed=seed,
            answer_weight=answer_weight, unmeasured=_unmeasured(form),
        )  # fmt: skip
        names = list(moments)
        del moments
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            whole(linear.weight)


def open_factors(directory: Path) -> FactorStore:
    """A finished store; raises UserError when a file is missing or altered."""
    measured = open_artifact(directory, KIND)["measured"]
    shapes = measured["shapes"]
    with safe_open(directory / ENERGIES, framework="np") as stored:
        energies = {name: stored.get_tensor(name) for name in stored.keys()}
    none = np.zeros(0)
    modules = tuple(Module(n, o, i, energies.get(n, none)) for n, (o, i) in shapes.items())
    neurons = {name: energy for name, energy in energies.items() if name not in shapes}
    return FactorStore(directory, str(measured.get("form")), modules, neurons)


def _factor(
    name: str,
    weight_OI: Tensor,
    moments: Moments,
    form: str,
    stored: dict[str, Tensor],
    energies: dict[str, Tensor],
) -> None:
    """Factor one module into ``stored`` and ``energies``, or rank the neurons that it reads."""
    if _ranks_neurons(name, form):
        block = name.rpartition(".")[0]
        ranking = rank_neurons(weight_OI, moments.input_II, moments.gradient_OO)
        energies[block] = ranking.energy_M.contiguous().cpu()
        stored[f"{block}.order"] = ranking.order_M.contiguous().cpu()
        stored[f"{block}.moment"] = moments.input_II.contiguous().cpu()
        return
    gradient_OO = None if form == "svd" else moments.gradient_OO
    factors = two_sided_svd(weight_OI, moments.input_II, gradient_OO)
    rank = break_even_rank(*weight_OI.shape)
    energies[name] = factors.energy_K.cpu()
    stored[f"{name}.up"] = factors.up_OK[:, :rank].contiguous().cpu()
    stored[f"{name}.down"] = factors.down_KI[:rank].contiguous().cpu()
    if gradient_OO is not None:
        stored[f"{name}.metric"] = metric_root(gradient_OO)


def _layer_file(name: str) -> str:
    return f"layer-{name.split('.')[2]}.safetensors"
