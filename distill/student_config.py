"""Configs of a student: plain or budgeted, valid to save, readable by older readers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from distill.artifact import UserError
from distill.modeling_budgeted import MODEL_CLASSES

CLASS_FIELDS = ("model_type", "architectures", "auto_map", "ranks", "widths", "base_model_type")
"""Fields of a config that say which class it is of, or that only a budgeted class has."""
_ORIGIN_FIELDS = ("transformers_version", "_name_or_path")


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the plain architecture that ``config``, plain or budgeted, stands on."""
    return AutoConfig.for_model(_base_type(config), **_shared_fields(config))


def budgeted_config(
    config: PretrainedConfig, ranks: Mapping[str, int], widths: Mapping[str, int]
) -> PretrainedConfig:
    """The budgeted config of ``config``'s family with these ranks and widths."""
    model_class: Any = MODEL_CLASSES[_base_type(config)]
    plain = [{name: int(value) for name, value in part.items()} for part in (ranks, widths)]
    return model_class.config_class(ranks=plain[0], widths=plain[1], **_shared_fields(config))


def supported_family(model_type: object) -> str:
    """``model_type`` if a budgeted class exists for it, else UserError with the allowed ones."""
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        allowed = ", ".join(MODEL_CLASSES)
        raise UserError(
            f"architecture {model_type!r} is not supported; allowed are {allowed}; "
            "choose a model of one of these families"
        )
    return model_type


def _base_type(config: PretrainedConfig) -> str:
    return supported_family(getattr(config, "base_model_type", config.model_type))


def _shared_fields(config: PretrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in (*CLASS_FIELDS, *_ORIGIN_FIELDS)}


def valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    """``config`` as transformers accepts it for saving: hub models often contradict themselves.

    Sampling parameters without ``do_sample`` switch it on; what is still invalid falls back to
    the token ids alone.
    """
    ids = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id")}
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    for candidate in (config, sampling):
        try:
            candidate.validate(strict=True)
        except ValueError:
            continue
        return candidate
    return GenerationConfig(**ids)


def readable_config(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the RoPE keys that readers older than transformers 5 expect at top level."""
    rope = values.get("rope_parameters")
    if not rope:
        return values
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    values["rope_theta"] = whole["rope_theta"]
    if local:
        values["rope_local_base_freq"] = local["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        values["rope_scaling"] = {k: v for k, v in whole.items() if k != "rope_theta"}
    return values


def readable_tokenizer_config(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the names that transformers 4 knows and 5 still reads."""
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values
