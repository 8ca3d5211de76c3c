"""What the five families do differently, read once from a student's config.json.

Shapes: D head dimension.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from distill.artifact import UserError, read_json
from distill.modeling_budgeted import MODEL_CLASSES
from distill.quiet import first_line
from distill.student_config import CLASS_FIELDS, supported_family

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ROPE_BY_LAYER_TYPE = hasattr(LlamaConfig(), "rope_parameters")  # transformers 5
STATIC_ROPES = ("default", "linear", "llama3", "yarn")
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rotary:
    """Angles are position · inv_freq; cosine and sine are multiplied by `scaling`."""

    inv_freq: np.ndarray  # [D / 2], float32
    scaling: float


@dataclass(frozen=True)
class Architecture:
    """One decoder's structure: sizes, and every detail in which families differ."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    activation: str  # silu | gelu | gelu_tanh
    attention_scale: float
    windows: tuple[int | None, ...]  # per layer: keys seen, the query's own included; None: all
    layer_ropes: tuple[str, ...]  # per layer: a key of `ropes`
    ropes: Mapping[str, Rotary]
    tied_head: bool
    norm_offset: float  # gemma stores the norms' scales less one
    qk_norms: bool
    sandwich_norms: bool  # gemma also normalises what each branch adds
    embedding_scale: float | None
    logits_softcap: float | None


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a student directory, plain or budgeted.

    Raises: UserError for a config.json that is damaged, of an unsupported family, or that uses a
        feature the graph lacks.
    """
    config = _plain(directory)
    try:
        return _architecture(config, Path(directory) / "config.json")
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{directory}/config.json has a wrong value ({first_line(error)}); needs a student's "
            "config.json; write it again with: python -m distill"
        ) from None


def _architecture(config: PretrainedConfig, path: Path) -> Architecture:
    family = config.model_type
    gemma = family == "gemma3_text"
    kinds = _layer_types(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = config.query_pre_attn_scalar if gemma else head_dim
    windows = tuple(config.sliding_window if kind == SLIDING else None for kind in kinds)
    ropes = {kind: _rotary(config, kind, path) for kind in sorted(set(kinds))}
    return Architecture(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        activation=_activation(config, path),
        attention_scale=scale**-0.5,
        windows=windows,
        layer_ropes=kinds,
        ropes=ropes,
        tied_head=bool(config.tie_word_embeddings),
        norm_offset=1.0 if gemma else 0.0,
        qk_norms=family in ("qwen3", "gemma3_text"),
        sandwich_norms=gemma,
        embedding_scale=config.hidden_size**0.5 if gemma else None,
        logits_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _plain(directory: Path) -> PretrainedConfig:
    """The plain family's config, whatever class of ours or code the file names."""
    path = Path(directory) / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no fields; needs a student's config.json; distil it again")
    family = supported_family(values.get("base_model_type", values.get("model_type")))
    try:
        config = AutoConfig.for_model(
            family, **{key: value for key, value in values.items() if key not in CLASS_FIELDS}
        )
    except Exception as error:  # transformers' validators raise types of their own
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); needs a student's config.json; write "
            "it again with: python -m distill"
        ) from None
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            f"{path} asks for bidirectional attention; needs a causal model; choose one"
        )
    return config


def _layer_types(config: PretrainedConfig) -> tuple[str, ...]:
    """Per layer "sliding_attention" or "full_attention"."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None:
        return (FULL,) * config.num_hidden_layers
    if config.model_type == "mistral" or kinds is None:
        return (SLIDING,) * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {SLIDING, FULL}):
        raise ValueError(f"layer type {unknown[0]!r}; allowed are {SLIDING} and {FULL}")
    return tuple(kinds)


def _activation(config: PretrainedConfig, path: Path) -> str:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in ACTIVATIONS:
        raise UserError(
            f"{path} has the activation {name!r}; allowed are "
            f"{' '.join(ACTIVATIONS)}; choose a model with one of these"
        )
    return ACTIVATIONS[name]


def _rotary(config: PretrainedConfig, kind: str, path: Path) -> Rotary:
    """Frequencies as the family's own transformers class computes them for this layer type."""
    parameters = _rope_parameters(config, kind)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in STATIC_ROPES:
        raise UserError(
            f"{path} has RoPE of type {rope_type!r}, which changes with the "
            f"sequence; allowed are {' '.join(STATIC_ROPES)}; choose a model with one of these"
        )
    model_class = MODEL_CLASSES[config.model_type].__mro__[1]
    module = sys.modules[model_class.__module__]
    rotary_class = getattr(module, model_class.__name__.replace("ForCausalLM", "RotaryEmbedding"))
    rotary: Any = rotary_class(_with_rope_of(config, kind))
    inv_freq = getattr(rotary, f"{kind}_inv_freq", None)
    if inv_freq is None:
        return Rotary(rotary.inv_freq.float().numpy(), float(rotary.attention_scaling))
    return Rotary(inv_freq.float().numpy(), float(getattr(rotary, f"{kind}_attention_scaling")))


def _rope_parameters(config: PretrainedConfig, kind: str) -> dict[str, Any]:
    """RoPE's parameters of one layer type: transformers 5 has one name for them, 4 another."""
    if ROPE_BY_LAYER_TYPE:
        return config.rope_parameters.get(kind, config.rope_parameters)
    local = kind == SLIDING and hasattr(config, "rope_local_base_freq")
    return {} if local else (getattr(config, "rope_scaling", None) or {})


def _with_rope_of(config: PretrainedConfig, kind: str) -> PretrainedConfig:
    """For transformers 4: the config whose only RoPE is the local one of gemma."""
    if ROPE_BY_LAYER_TYPE or kind != SLIDING or not hasattr(config, "rope_local_base_freq"):
        return config
    changed = copy.deepcopy(config)
    changed.rope_theta, changed.rope_scaling = config.rope_local_base_freq, None
    return changed
