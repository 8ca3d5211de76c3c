"""The tokens of a run: chosen text and synthetic few-shot sequences, for training and held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.args import DistilArgs
from distill.artifact import UserError
from distill.console import progress
from distill.data import TokenSet, mix, pack, plain, split_documents
from distill.documents import load_documents
from distill.fewshot import fewshot_sequences
from distill.processes import ALONE, Crew
from distill.selftext import write_self_text
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

    @property
    def fingerprint(self) -> str:
        """sha256 of every token in its place."""
        digest = hashlib.sha256()
        for ids_NT in (self.train.ids_NT, self.refit.ids_NT, self.heldout_NT):
            digest.update(f"{ids_NT.shape}".encode() + np.ascontiguousarray(ids_NT).tobytes())
        return digest.hexdigest()


def prepare_text(args: DistilArgs, teacher: Loaded, cache: Path, *, crew: Crew = ALONE) -> RunText:
    """Load or write the text, keep documents apart for evaluation, pack and mix.

    Raises UserError where text is missing, empty, too short or of tokens that the teacher lacks.
    In a crew only what the main process returns counts.
    """
    refit_count, fewshot_count = args.refit_sequences, args.fewshot_sequences
    text_count = args.sequences - fewshot_count
    fewshot_refit = round(args.fewshot_share * refit_count)
    all_text = text_count + refit_count - fewshot_refit
    documents = _documents(args, teacher, all_text, cache, crew)
    train_documents, heldout = split_documents(documents, args.heldout_share, args.seed)
    tokenizer, seq_len, seed = teacher.tokenizer, args.seq_len, args.seed
    text = plain(pack(tokenizer, train_documents, seq_len, all_text * seq_len, seed))
    lists = fewshot_sequences(tokenizer, fewshot_count + fewshot_refit, seq_len, seed)
    train = mix(text[:text_count], lists[:fewshot_count], seed)
    refit = mix(text[text_count:all_text], lists[fewshot_count:], seed)
    calibration = train[: max(1, args.statistics_tokens // seq_len)]
    heldout_NT = _heldout_windows(teacher, heldout, seq_len)
    for ids_NT in (train.ids_NT, refit.ids_NT, heldout_NT):
        _require_known_tokens(teacher, ids_NT)
    return RunText(train, calibration, refit, heldout_NT)


def self_text_file(args: DistilArgs, teacher: Loaded, cache: Path) -> Path:
    """Where the teacher's own text for these arguments is or will be."""
    parts = (teacher.fingerprint, teacher.model.dtype, _self_text_tokens(args))
    key = "|".join(map(str, (*parts, args.seq_len, args.seed)))
    return cache / f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"


def _self_text_tokens(args: DistilArgs) -> int:
    train_count = args.sequences - args.fewshot_sequences
    return round(train_count * args.seq_len / (1 - args.heldout_share))


def _documents(
    args: DistilArgs, teacher: Loaded, all_count: int, cache: Path, crew: Crew
) -> list[str]:
    """The teacher writes enough for the training sequences, which the refit's then repeat in
    another order; of other text ``all_count`` sequences are wanted."""
    if args.data != ("self",):
        wanted = all_count * args.seq_len / (1 - args.heldout_share)
        return load_documents(args.data, max_tokens=round(wanted * LOADED_EXTRA))
    wanted = _self_text_tokens(args)
    cache.mkdir(parents=True, exist_ok=True)
    with progress(wanted, "teacher writes text", enabled=crew.writes) as bar:
        return write_self_text(
            teacher.model, teacher.tokenizer, wanted, self_text_file(args, teacher, cache),
            seed=args.seed, batch_size=_equal_batch(-(-wanted // args.seq_len)),
            seq_len=args.seq_len, progress=bar, crew=crew,
        )  # fmt: skip


def _equal_batch(rows: int) -> int:
    """About 64 rows a batch: a small last batch would take as many steps as a full one."""
    return -(-rows // max(1, round(rows / SELF_TEXT_BATCH)))


def _heldout_windows(teacher: Loaded, documents: list[str], seq_len: int) -> np.ndarray:
    """Up to 16 windows, each token used once; one shorter window where there is no more text."""
    tokens, most = 0, HELDOUT_WINDOWS * seq_len
    for document in documents:
        ids = teacher.tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        tokens += 1 + len(ids)  # a separator before each
        if tokens >= most:
            break
    tokens = min(tokens, most)
    return pack(teacher.tokenizer, documents, min(seq_len, tokens), tokens, seed=0)


def _require_known_tokens(teacher: Loaded, ids_NT: np.ndarray) -> None:
    known = teacher.model.config.vocab_size
    if ids_NT.size and ids_NT.max() >= known:
        token = teacher.tokenizer.convert_ids_to_tokens(int(ids_NT.max()))
        raise UserError(
            f"the text has the token {token!r}, for which {teacher.source} has no embedding (it "
            f"has {known}); needs text of the model's own tokens; remove it from --data"
        )
