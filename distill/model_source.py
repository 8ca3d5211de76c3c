"""Turn what a user calls a model into a checked local Hugging Face directory.

A built-in name and a .gguf file become cached directories, a hub id its downloaded snapshot.
Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, PretrainedConfig

from distill.artifact import UserError, read_json, sha256_file
from distill.builtin import BUILTIN, builtin_gguf
from distill.gguf_directory import directory_from_gguf
from distill.quiet import first_line, quiet_hub

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3 (text)",
}
"""model_type -> its name for people."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFETENSORS = "model.safetensors"
_HINTS = {
    "gemma3": "; its text part alone is gemma3_text",
    "budgeted": "; a student's plain form is written with --dense-copy",
}


def directory_from_source(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Path, str]:
    """(directory, fingerprint of its weights) of a built-in name, directory, GGUF file or hub id.

    Raises: UserError when there is no such model, it is damaged, incomplete, unreachable, or of an
        architecture that FAMILIES does not hold.
    """
    path = Path(source).expanduser()
    if revision is not None and (source in BUILTIN or path.exists()):
        raise UserError(
            f"revision {revision!r} given for {source}; only hub ids have revisions; leave it out"
        )
    if source in BUILTIN:
        digest = BUILTIN[source].gguf_sha256
        return directory_from_gguf(builtin_gguf(source), digest), digest
    if source and path.is_dir():
        _require_supported(path / "config.json", source)
        weights = _weight_files(path, source)
        return path, _fingerprint([path / "config.json", *weights])
    if path.is_file() and path.suffix == ".gguf":
        digest = sha256_file(path)
        return directory_from_gguf(path.resolve(), digest), digest
    looks_local = source.startswith(("/", ".", "~")) or path.suffix == ".gguf"
    if path.exists() or looks_local or not _HUB_ID.fullmatch(source):
        found = (
            "is neither a directory nor a .gguf file"
            if source and path.exists()
            else "does not exist"
        )
        raise UserError(f"{source!r} {found}; {_allowed()}; check the spelling")
    directory = _hub_snapshot(source, revision, trust_remote_code)
    _weight_files(directory, source)
    return directory, directory.name


def read_config(directory: Path, source: str, trust_remote_code: bool) -> PretrainedConfig:
    """The model's config with dropout switched off: training mode equals eval mode."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"the config.json of {source} cannot be used ({first_line(error)}); needs the "
            f"config of a {', '.join(FAMILIES)}; get the model again"
        ) from error
    for name in vars(config):
        if name.endswith("dropout"):
            setattr(config, name, 0.0)
    return config


def _allowed() -> str:
    return (
        f"allowed: {', '.join(BUILTIN)}, a model directory, a .gguf file or a hub id like "
        "ORGANISATION/MODEL"
    )


def _require_supported(config_json: Path, source: str) -> None:
    """Refuse by name before anything heavy is read or downloaded."""
    if not config_json.is_file():
        raise UserError(
            f"{source} has no config.json; needs a Hugging Face model directory with config.json, "
            "*.safetensors and tokenizer; point to one, or to a .gguf file"
        )
    config: Any = read_json(config_json)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in FAMILIES:
        hint = _HINTS.get(str(model_type).split("_")[0], "")
        raise UserError(
            f"{source} has the architecture {model_type!r}; supported: {', '.join(FAMILIES)}; "
            f"choose a model of one of these families{hint}"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{source} is quantised ({method}); needs plain 16- or 32-bit weights or a .gguf file; "
            "give the model that it was quantised from"
        )


def _weight_files(directory: Path, source: str) -> list[Path]:
    """The safetensors files that the directory promises, all of them present."""
    index = directory / f"{_SAFETENSORS}.index.json"
    names = [_SAFETENSORS]
    if not (directory / _SAFETENSORS).is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        names = sorted(set(weight_map.values())) or names
    for name in names:
        if not (directory / name).is_file():
            pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
            remedy = "convert its pickled weights, which are never read," if pickled else "copy it"
            raise UserError(
                f"{source} lacks {name}; needs all weights as safetensors; "
                f"{remedy} into {directory}"
            )
    return [directory / name for name in names]


def _hub_snapshot(repo: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Download the repository's top-level weights, configs and tokenizer; config.json first."""
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        with quiet_hub():
            config_json = Path(hf_hub_download(repo, "config.json", revision=revision))
            _require_supported(config_json, repo)
            snapshot = snapshot_download(
                repo,
                revision=config_json.parent.name,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
    except UserError:
        raise
    except Exception as error:  # the hub's HTTP client, and so its exceptions, differ by version
        at = f" at revision {revision}" if revision else ""
        why = shorten(first_line(error), 160, placeholder=" …")
        raise UserError(
            f"cannot get {repo!r}{at} from the hub ({why}); "
            f"{_allowed()}; check name, network and access rights (a local path begins with ./)"
        ) from error
    return Path(snapshot)


def _fingerprint(files: list[Path]) -> str:
    """sha256 over the files' names and contents."""
    lines = [f"{sha256_file(path)}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
