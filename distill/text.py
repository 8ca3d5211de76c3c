"""The tokens of a run: chosen text and synthetic few-shot sequences, for training and held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.args import DistilArgs
from distill.console import progress
from distill.data import TokenSet, mix, pack, plain, split_documents
from distill.documents import load_documents
from distill.fewshot import fewshot_sequences
from distill.selftext import write_self_text
from distill.sharding import ALONE, Crew
from distill.teacher import Loaded

LOADED_EXTRA = 1.2
HELDOUT_WINDOWS = 16
SELF_TEXT_BATCH = 64


@dataclass(frozen=True)
class RunText:
    """``train``: the sequences in training order. ``calibration``: its first ones. ``refit``: more
    of the same kind that follow, which training does not repeat while the text lasts.
    ``heldout_NT``: windows of plain text from documents that training never sees."""

    train: TokenSet
    calibration: TokenSet
    refit: TokenSet
    heldout_NT: np.ndarray


def sequences_needed(args: DistilArgs) -> int:
    """Sequences of whole optimiser steps within ``--tokens``."""
    return args.tokens // args.batch_tokens * (args.batch_tokens // args.seq_len)


def prepare_text(args: DistilArgs, teacher: Loaded, cache: Path, *, crew: Crew = ALONE) -> RunText:
    """Load or write the text, keep documents apart for evaluation, pack and mix.

    Raises UserError where text is missing, empty or too short. In a crew only what the
    main process returns counts.
    """
    count = sequences_needed(args)
    refit_count = count if args.refit_tokens is None else args.refit_tokens // args.seq_len
    fewshot_count = round(args.fewshot_share * count)
    text_count = count - fewshot_count
    fewshot_refit = round(args.fewshot_share * refit_count)
    all_text = text_count + refit_count - fewshot_refit
    documents = _documents(args, teacher, text_count, all_text, cache, crew)
    train_documents, heldout = split_documents(documents, args.heldout_share, args.seed)
    tokenizer, seq_len, seed = teacher.tokenizer, args.seq_len, args.seed
    text = plain(pack(tokenizer, train_documents, seq_len, all_text * seq_len, seed))
    lists = fewshot_sequences(tokenizer, fewshot_count + fewshot_refit, seq_len, seed)
    train = mix(text[:text_count], lists[:fewshot_count], seed)
    refit = mix(text[text_count:all_text], lists[fewshot_count:], seed)
    calibration = train[: max(1, args.statistics_tokens // seq_len)]
    return RunText(train, calibration, refit, _heldout_windows(teacher, heldout, seq_len))


def _documents(
    args: DistilArgs, teacher: Loaded, train_count: int, all_count: int, cache: Path, crew: Crew
) -> list[str]:
    """The teacher writes enough for ``train_count`` sequences, which the refit's then repeat in
    another order; of other text ``all_count`` sequences are wanted."""
    if args.data != ("self",):
        wanted = all_count * args.seq_len
        return load_documents(args.data, max_tokens=round(wanted * LOADED_EXTRA))
    tokens = train_count * args.seq_len
    wanted = round(tokens / (1 - args.heldout_share))
    key = hashlib.sha256(
        f"{teacher.fingerprint}|{teacher.model.dtype}|{wanted}|{args.seq_len}|{args.seed}".encode()
    ).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with progress(wanted, "teacher writes text", enabled=crew.writes) as bar:
        return write_self_text(
            teacher.model, teacher.tokenizer, wanted, cache / f"text-{key}.jsonl",
            seed=args.seed, batch_size=_equal_batch(-(-wanted // args.seq_len)),
            seq_len=args.seq_len, progress=bar, crew=crew,
        )  # fmt: skip


def _equal_batch(rows: int) -> int:
    """About 64 rows a batch: a small last batch would take as many steps as a full one."""
    return -(-rows // max(1, round(rows / SELF_TEXT_BATCH)))


def _heldout_windows(teacher: Loaded, documents: list[str], seq_len: int) -> np.ndarray:
    """Up to 16 windows, each token used once."""
    separator_per_document = 1
    lengths = [
        len(teacher.tokenizer(d, add_special_tokens=False, verbose=False).input_ids)
        + separator_per_document
        for d in documents
    ]
    tokens = min(sum(lengths), HELDOUT_WINDOWS * seq_len)
    return pack(teacher.tokenizer, documents, seq_len, tokens, seed=0)
