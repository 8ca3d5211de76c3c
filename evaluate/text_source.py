"""The text that perplexity is measured on: a file, a hub data set, or the runs' held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.args import DistilArgs
from distill.artifact import UserError, read_json
from distill.data import document_separator, load_documents, sequence_prefix
from distill.teacher import Loaded
from distill.text import prepare_text
from evaluate.perplexity import Window, make_windows

SPLIT_FIELDS = ("data", "seed", "heldout_share", "teacher")
SELF_FIELDS = ("tokens", "fewshot_share", "seq_len")


@dataclass(frozen=True)
class EvaluationText:
    """Token windows, and where they come from in words."""

    windows: list[Window]
    source: str
    sha256: str


def evaluation_text(
    text: str,
    runs: Sequence[Path],
    teacher: Loaded,
    *,
    window: int,
    stride: int,
    limit: int,
) -> EvaluationText:
    """Windows of `text`: "heldout", a .txt or .jsonl file, or hub:NAME[:CONFIG][:SPLIT][:FIELD].

    Raises: UserError when there is no text, or when the runs' held-out texts differ.
    """
    tokenizer = teacher.tokenizer
    prefix = sequence_prefix(tokenizer)
    if text == "heldout":
        stream, source = _heldout_stream(runs, teacher, len(prefix)), f"held-out text of {runs[0]}"
    else:
        documents = load_documents([text], max_tokens=window + stride * limit)
        stream, source = _stream(tokenizer, documents, window + stride * limit), text
    windows = make_windows(
        tokenizer, stream, window=window, stride=stride, limit=limit, prefix=prefix
    )
    if not windows:
        raise UserError(
            f"{text} gives {len(stream)} tokens; perplexity needs at least 2; give a longer --text"
        )
    digest = hashlib.sha256()
    for item in windows:
        digest.update(item.ids_T.tobytes() + bytes([item.first % 256]))
    return EvaluationText(windows, source, digest.hexdigest())


def _stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], tokens: int
) -> np.ndarray:
    """Token ids of whole documents in order, a separator before each, until there are enough."""
    separator = document_separator(tokenizer)
    ids: list[int] = []
    for document in documents:
        ids += [separator, *tokenizer(document, add_special_tokens=False, verbose=False).input_ids]
        if len(ids) >= tokens:
            break
    return np.array(ids, dtype=np.int64)


def _heldout_stream(runs: Sequence[Path], teacher: Loaded, prefix: int) -> np.ndarray:
    """The windows that each run measured itself on, as one stream.

    Raises: UserError when the runs split their text differently: what one holds out, another may
        have trained on.
    """
    requests = [(run, _request(run)) for run in runs if (run / "request.json").is_file()]
    if not requests:
        raise UserError(
            f"{runs[0]} has no request.json, so its held-out text is unknown; needs a run folder "
            "of python -m distill; give --text FILE"
        )
    first_run, first = requests[0]
    for run, request in requests[1:]:
        own = first.get("data") == ["self"]
        for field in (*SPLIT_FIELDS, *(SELF_FIELDS if own else ())):
            if request.get(field) != first.get(field):
                raise UserError(
                    f"{run} was trained with --{field.replace('_', '-')} {request.get(field)}, "
                    f"{first_run} with {first.get(field)}: the held-out text of one may be "
                    "training text of the other; needs text that neither saw; give --text FILE"
                )
    args = _arguments(first_run, first)
    cache = first_run.parent / "cache"
    if args.data == ("self",) and not list(cache.glob("text-*.jsonl")):
        raise UserError(
            f"{cache} no longer holds the text that the teacher wrote; needs it to know what "
            f"{first_run} held out; give --text FILE"
        )
    if args.dtype != "auto":  # the text that the teacher wrote is found by its precision
        teacher.model.to(getattr(torch, args.dtype))
    return prepare_text(args, teacher, cache).heldout_NT[:, prefix:].reshape(-1).astype(np.int64)


def _arguments(run: Path, request: dict[str, Any]) -> DistilArgs:
    """What shaped the text of a run; flags of other versions, which did not, are passed over."""
    known = {f.name for f in fields(DistilArgs)}
    try:
        values = {k: v for k, v in request.items() if k in known}
        return DistilArgs(**{**values, "data": tuple(values["data"]), "run": str(run)})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run / 'request.json'} is not a run's request ({error!r}), so its held-out text is "
            "unknown; needs the file that python -m distill wrote; give --text FILE"
        ) from error


def _request(run: Path) -> dict[str, Any]:
    return dict(read_json(run / "request.json"))
