"""Load a causal LM to distil from: a built-in name, a directory, a .gguf file or a hub id.

Whatever the source, the caller gets the same thing: a plain architecture in the wanted precision,
in eval mode, without gradients or dropout, and a tokenizer with a pad token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.artifact import UserError, require_memory
from distill.builtin import BUILTIN, cache_dir
from distill.model_source import FAMILIES, directory_from_source, read_config
from distill.quiet import first_line, quiet_transformers

__all__ = [
    "BUILTIN",
    "FAMILIES",
    "Loaded",
    "cache_dir",
    "load_teacher",
    "quiet_transformers",
    "require_same_tokenizer",
    "target_modules",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_PROBES = (
    "Q: hot\nA: cold\n\n12 + 345 = 357 -> \tthe  End.",
    "naïve café, 東京; don't STOP_here(x[0]) == 'ok'\r\n",
)
_LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError),
    SafetensorError,
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to be read from.

    `fingerprint` identifies its weights: the sha256 of a GGUF file, a sha256 over a directory's
    config and safetensors, or the commit of a hub model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


def load_teacher(
    source: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load `source` onto the CPU in `dtype`.

    Args:
        source: a name of BUILTIN, a local directory, a .gguf file, or a hub id.
        revision: branch, tag or commit; of a hub id only.
        trust_remote_code: run code found beside the weights; never done otherwise.

    Raises: UserError when the source is missing, damaged, unreachable or of another architecture,
        or when it does not fit into memory.
    """
    directory, fingerprint = directory_from_source(
        source, revision=revision, trust_remote_code=trust_remote_code
    )
    with quiet_transformers():
        config = read_config(directory, source, trust_remote_code)
        require_memory(int(1.2 * _weight_bytes(config, source, dtype)), f"loading {source}")
        tokenizer = _load_tokenizer(directory, source, trust_remote_code)
        model = _load_model(directory, source, config, dtype, trust_remote_code)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, its embedding "
            f"{model.config.vocab_size}; needs the model's own tokenizer; copy its files again"
        )
    _pin_pad_token(model, tokenizer, source)
    return Loaded(model, tokenizer, source, fingerprint)


def target_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every Linear inside the decoder blocks of a plain model, first layer first.

    Keys are full names such as `model.layers.0.self_attn.q_proj`. Embedding and head are not
    targets.

    Raises: ValueError when there is none.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(r"model\.layers\.\d+\.", name)
    }
    if not modules:
        raise ValueError(f"{type(model).__name__} has no Linear below model.layers")
    return modules


def require_same_tokenizer(a: Loaded, b: Loaded) -> None:
    """Compare vocabularies, bos and eos, and the encoding of two probe texts.

    The embeddings may still be padded to different vocabulary sizes.

    Raises: UserError naming both sources and the first difference.
    """
    difference = _tokenizer_difference(a.tokenizer, b.tokenizer)
    if difference:
        raise UserError(
            f"{a.source} and {b.source} have different tokenizers ({difference}); teacher and "
            "student need the same one; choose two models of one series"
        )


def _tokenizer_difference(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    vocabulary_a, vocabulary_b = a.get_vocab(), b.get_vocab()
    if vocabulary_a != vocabulary_b:
        differing = dict(vocabulary_a.items() ^ vocabulary_b.items())
        return (
            f"{len(vocabulary_a)} and {len(vocabulary_b)} tokens, {len(differing)} of them "
            f"differing, such as {min(differing)!r}"
        )
    for name in ("bos_token", "eos_token"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} {getattr(a, name)!r} and {getattr(b, name)!r}"
    for text in _PROBES:
        if a(text).input_ids != b(text).input_ids:
            return f"{text!r} is encoded differently"
    return None


def _weight_bytes(config: PretrainedConfig, source: str, dtype: torch.dtype) -> int:
    """Bytes of the model's parameters in `dtype`, tied ones counted once; nothing is loaded."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except _LOAD_ERRORS as error:
        raise UserError(
            f"the config.json of {source} describes no working model ({first_line(error)}); needs "
            "the config that belongs to its weights; get the model again"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _load_tokenizer(
    directory: Path, source: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{source} has no tokenizer; needs one of {', '.join(_TOKENIZER_FILES)} beside the "
            f"weights; copy the model's tokenizer files into {directory}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(
            f"the tokenizer of {source} cannot be read ({first_line(error)}); needs the "
            "model's own tokenizer files; copy them again"
        ) from error
    tokenizer.init_kwargs.pop("local_files_only", None)  # else it is saved with the tokenizer
    return tokenizer


def _load_model(
    directory: Path,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model, frozen. transformers would fill missing weights with random ones: refused here."""
    model_loader: Any = AutoModelForCausalLM
    try:
        model, report = model_loader.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except _LOAD_ERRORS as error:
        raise UserError(
            f"the weights of {source} cannot be read ({first_line(error)}); needs complete "
            "safetensors that fit its config.json; get the model again"
        ) from error
    misfits = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]]
    misfits += [key for key in report["unexpected_keys"] if ".layers." in key]
    if misfits:
        raise UserError(
            f"the weights of {source} do not fit its config.json ({len(misfits)} tensors, such as "
            f"{min(misfits)}); needs exactly those of a {config.model_type}; get the model again"
        )
    return model.requires_grad_(False).eval()


def _pin_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Batches need a pad token; one that is missing becomes eos, in model and tokenizer alike."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"the tokenizer of {source} has no special tokens; needs eos or pad; add eos_token to "
            "its tokenizer_config.json"
        )
    for config in (model.config, model.generation_config):
        if config is not None and config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
