"""The student directory, written and read: what transformers loads, and nothing unpickled.

Shapes: D in_features, E out_features, R rank. What a directory costs is counted in
``distill.macs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.artifact import UserError, read_json, write_json
from distill.macs import Macs, count_macs, dense_macs_from_config, stored_shapes
from distill.modeling_budgeted import MODEL_CLASSES, PROJECTIONS, FactoredLinear, RemovedLinear
from distill.quiet import first_line
from distill.student_config import (
    budgeted_config,
    plain_config,
    readable_config,
    readable_tokenizer_config,
    supported_family,
    valid_generation_config,
)

__all__ = [
    "Macs",
    "count_macs",
    "dense_macs_from_config",
    "dense_state",
    "load_student",
    "save_dense_copy",
    "save_student",
]

SHARD_SIZE = "5GB"


def save_student(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Mapping[str, int],
    widths: Mapping[str, int] | None = None,
    *,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write ``model`` so that ``from_pretrained`` rebuilds it exactly.

    ``model`` is of a supported plain family, its target modules being ``nn.Linear``,
    ``FactoredLinear`` or ``RemovedLinear`` as ``ranks`` says, of ``widths`` neurons where that
    names their MLP. Without either the plain architecture is written, with no code beside it.

    Raises:
        ValueError: the model's modules or tied weights contradict the arguments or its config.
        UserError: the architecture is not supported.
    """
    widths = widths or {}
    _require_structure(model, ranks, widths)
    plain = plain_config(model.config)
    config = budgeted_config(plain, ranks, widths) if ranks or widths else plain
    _write(directory, config, model.state_dict(), model, tokenizer, max_shard_size)


def load_student(directory: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The student in ``directory`` in eval mode, in ``dtype`` (None: as stored).

    The classes are this package's own: code in the directory is never run.

    Raises:
        UserError: unreadable files, an unsupported architecture, or tensors that do not fit it.
    """
    values = read_json(directory / "config.json")
    base_type = supported_family(values.get("base_model_type", values.get("model_type")))
    stored_shapes(directory)  # transformers 4 loads a shard that lacks an indexed tensor
    is_plain = values.get("model_type") == base_type
    model_class: Any = AutoModelForCausalLM if is_plain else MODEL_CLASSES[base_type]
    try:
        model, report = model_class.from_pretrained(
            directory,
            dtype=dtype or "auto",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "its tensors have other shapes than its config.json says"
        elif isinstance(error, TypeError):
            reason = f"its config.json has a wrong value ({reason})"
        raise UserError(f"{directory} cannot be loaded: {reason}; distil it again") from error
    wrong = sorted(str(key) for kind in report.values() for key in kind)
    if wrong:
        raise UserError(
            f"the weights in {directory} do not fit its config.json: {', '.join(wrong[:3])}"
            f"{' ...' if len(wrong) > 3 else ''}; distil it again"
        )
    return model.eval()


def save_dense_copy(
    directory: Path,
    student_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write the plain architecture with the same function, in ``dtype`` (None: the student's).

    Any harness or converter reads it; it saves no compute.
    """
    state = dense_state(student_model)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    config = plain_config(student_model.config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _write(directory, config, state, student_model, tokenizer, max_shard_size)


@torch.no_grad()
def dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict of the plain architecture: W_ED = up_ER · down_RD (in float64), 0 if removed; to a
    narrowed MLP come neurons that are zero."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            up_ER, down_RD = (state.pop(f"{name}.{part}.weight") for part in ("up", "down"))
            state[f"{name}.weight"] = (up_ER.double() @ down_RD.double()).to(up_ER.dtype)
            if module.up.bias is not None:
                state[f"{name}.bias"] = state.pop(f"{name}.up.bias")
        elif isinstance(module, RemovedLinear):
            state[f"{name}.weight"] = torch.zeros(
                module.out_features, module.in_features, dtype=model.dtype, device=model.device
            )
    *writers, reader = PROJECTIONS
    for block, width in narrow_widths(model).items():
        missing = model.config.intermediate_size - width
        wider = [f"{block}.{reader}.weight", *(f"{block}.{leaf}.bias" for leaf in writers)]
        taller = [f"{block}.{leaf}.weight" for leaf in writers]
        for names, padding in ((wider, (0, missing)), (taller, (0, 0, 0, missing))):
            state |= {name: F.pad(state[name], padding) for name in names if name in state}
    return state


def narrow_widths(model: PreTrainedModel) -> dict[str, int]:
    """Neurons of every MLP that has fewer than the config says, by its name."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        block, _, leaf = name.rpartition(".")
        if leaf == PROJECTIONS[-1] and isinstance(module, nn.Linear):
            if module.in_features < model.config.intermediate_size:
                found[block] = module.in_features
    return found


def _write(
    directory: Path,
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    source: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_size: str,
) -> None:
    """Save ``state`` as a model of ``config``, with ``source``'s generation config."""
    _require_tie(config, state)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = valid_generation_config(source.generation_config)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    write_json(directory / "config.json", readable_config(read_json(directory / "config.json")))
    tokenizer_file = directory / "tokenizer_config.json"
    write_json(tokenizer_file, readable_tokenizer_config(read_json(tokenizer_file)))


def _require_structure(
    model: PreTrainedModel, ranks: Mapping[str, int], widths: Mapping[str, int]
) -> None:
    """Raise ValueError unless ranks and widths of the modules are exactly the arguments."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            found[name] = module.rank
        elif isinstance(module, RemovedLinear):
            found[name] = 0
    narrow = narrow_widths(model)
    for what, held, said in (("rank", found, ranks), ("width", narrow, widths)):
        for name in sorted(held.keys() | said.keys()):
            if held.get(name) != said.get(name):
                raise ValueError(
                    f"{name}: the model holds {what} {held.get(name, 'none')}, "
                    f"the {what}s say {said.get(name, 'none')}"
                )


def _require_tie(config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless head and embedding share storage exactly as the config says."""
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    tied = head.data_ptr() == embedding.data_ptr()
    if tied != bool(config.tie_word_embeddings):
        raise ValueError(
            f"tie_word_embeddings is {config.tie_word_embeddings}, but head and embedding are "
            f"{'one tensor' if tied else 'two tensors'}"
        )
