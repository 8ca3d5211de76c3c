"""A GGUF file as an ordinary Hugging Face directory, dequantised once and kept in the user's cache.

transformers takes 15 to 60 s to dequantise a 135M-parameter file and refuses to save the result as
it is; the directory written here loads in about a second.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.artifact import (
    UserError,
    open_artifact,
    require_disk,
    require_memory,
    staged,
    write_manifest,
)
from distill.builtin import cache_lock
from distill.quiet import first_line, quiet_transformers
from distill.student_format import save_student

KIND = "dequantised-gguf"
CONVERSION = 1  # raise it when the same file has to become a different directory

FAMILY_OF_GGUF = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}


@dataclass(frozen=True)
class _Header:
    reader: GGUFReader
    pre_tokenizer: str
    tensor_count: int
    elements: int


def directory_from_gguf(file: Path, gguf_sha256: str) -> Path:
    """The cached fp32 directory of `file`, verified against its manifest; made when not there.

    A cached directory that fails verification is made again.

    Raises: UserError when the file is truncated, is no GGUF, or holds another architecture.
    """
    with cache_lock() as cache:
        final = cache / f"gguf-{gguf_sha256[:24]}-{CONVERSION}"
        with contextlib.suppress(UserError):
            if open_artifact(final, KIND)["parent"] == gguf_sha256:
                return final
        header = _read_header(file)
        weight_bytes = 4 * header.elements
        require_disk(cache, weight_bytes, f"the dequantised {file.name}")
        require_memory(3 * weight_bytes, f"dequantising {file.name}")
        print(f"dequantising {file.name} (once, under a minute for 135M)", file=sys.stderr)
        with staged(final) as directory:
            _dequantise(file, header, directory)
            write_manifest(
                directory, kind=KIND, parent=gguf_sha256, argv=[str(file)], seed=0, measured={}
            )
    return final


def _read_header(file: Path) -> _Header:
    """Architecture and tensors of the file; reading them also proves that it is complete."""
    try:
        reader = GGUFReader(file)
        fields = reader.fields
        architecture = str(fields["general.architecture"].contents())
        pre = fields.get("tokenizer.ggml.pre")
        elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror or error}; needs a readable .gguf file; "
            "check its path and permissions"
        ) from error
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeError) as error:
        raise UserError(
            f"{file} is truncated or no GGUF file ({file.stat().st_size} bytes); needs a complete "
            "GGUF file of version 2 or 3; download it again"
        ) from error
    if architecture not in FAMILY_OF_GGUF:
        raise UserError(
            f"{file} holds the architecture {architecture!r}; supported: "
            f"{', '.join(FAMILY_OF_GGUF)}; choose a model of one of these families"
        )
    return _Header(reader, str(pre.contents()) if pre else "", len(reader.tensors), elements)


@contextlib.contextmanager
def _parsed_once(header: _Header) -> Iterator[None]:
    """Hand transformers the reader that is there: it parses the same file four times otherwise."""
    module: Any = gguf
    original = module.GGUFReader
    module.GGUFReader = lambda *_args, **_options: header.reader
    try:
        yield
    finally:
        module.GGUFReader = original


def _dequantise(file: Path, header: _Header, directory: Path) -> None:
    """Write the plain fp32 model and its tokenizer.

    transformers fills tensors that the file lacks with random numbers and drops those it has no
    place for, both in silence; either is refused here.
    """
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model_loader: Any = AutoModelForCausalLM
    try:
        with _parsed_once(header), _silence():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model, report = model_loader.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError) as error:
        raise UserError(
            f"transformers cannot read {file} ({first_line(error)}); needs a GGUF of "
            f"{', '.join(FAMILY_OF_GGUF)} with its tokenizer; "
            "give the Hugging Face directory instead"
        ) from error
    parameters = sum(1 for _ in model.parameters())
    missing = sorted(report["missing_keys"])
    if missing or parameters != header.tensor_count:
        raise UserError(
            f"{file} has {header.tensor_count} tensors where a plain {model.config.model_type} has "
            f"{parameters}{f' (missing {missing[0]})' if missing else ''}; needs exactly these "
            "(no experts, no scaled rotary table); give the Hugging Face directory instead"
        )
    del model.config.quantization_config
    _complete_tokenizer(tokenizer, header, model.config.max_position_embeddings)
    with _silence():
        save_student(directory, model, tokenizer, {})


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No notices, and none of the bars that transformers' own switch does not reach."""
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        yield


def _complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, header: _Header, max_length: int
) -> None:
    """Restore what the conversion loses: SmolLM's splitting of digits, and the context length."""
    tokenizer.init_kwargs.pop("local_files_only", None)  # else it is saved with the tokenizer
    tokenizer.model_max_length = max_length
    tokenizer.clean_up_tokenization_spaces = False
    if header.pre_tokenizer == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
