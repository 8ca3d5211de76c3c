"""Training text: splitting documents, packing them into token sequences, mixing.

Axis legend: N sequences, T positions in a sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.artifact import UserError
from distill.documents import END_OF_TEXT, load_documents

__all__ = [
    "TokenSet",
    "document_separator",
    "load_documents",
    "mix",
    "pack",
    "plain",
    "sequence_prefix",
    "split_documents",
]


@dataclass(frozen=True)
class TokenSet:
    """Sequences of equal length.

    ids_NT: int32 token ids. answer_NT: bool, True at t when token t+1 belongs to the answer of a
    synthetic few-shot pair; False everywhere for plain text.
    """

    ids_NT: np.ndarray
    answer_NT: np.ndarray

    def __post_init__(self) -> None:
        if self.ids_NT.ndim != 2 or self.ids_NT.shape != self.answer_NT.shape:
            raise ValueError(
                f"ids_NT {self.ids_NT.shape}, answer_NT {self.answer_NT.shape}: equal 2-D needed"
            )

    def __len__(self) -> int:
        return int(self.ids_NT.shape[0])

    def __getitem__(self, rows: slice) -> TokenSet:
        return TokenSet(self.ids_NT[rows], self.answer_NT[rows])


def plain(ids_NT: np.ndarray) -> TokenSet:
    """TokenSet of text without synthetic answers."""
    return TokenSet(ids_NT, np.zeros(ids_NT.shape, dtype=bool))


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token between documents: `<|endoftext|>` if known, else bos, else eos."""
    known = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    unknown = (None, tokenizer.unk_token_id)
    is_special = known not in unknown or tokenizer.unk_token == END_OF_TEXT
    for token_id in (known if is_special else None, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise UserError(
        f"tokenizer {tokenizer.name_or_path!r} has neither {END_OF_TEXT}, bos nor eos; "
        "a document separator is needed; set tokenizer.eos_token in its configuration"
    )


def sequence_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] when the tokenizer itself puts bos before every text (Llama, Gemma), else []."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return [int(bos)] if bos is not None and len(ids) > 1 and ids[0] == bos else []


def pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    seq_len: int,
    tokens: int,
    seed: int,
) -> np.ndarray:
    """Shuffled documents, a separator before each, cut into sequences without padding.

    Returns ids_NT int32 with N = max(1, tokens // seq_len), T = seq_len. Cycles over the text in
    freshly shuffled epochs when it is shorter than `tokens`. Raises UserError on empty text.
    """
    prefix = sequence_prefix(tokenizer)
    body = seq_len - len(prefix)
    count = max(1, tokens // seq_len)
    stream = _token_stream(tokenizer, documents, count * body, seed)
    body_NT = stream.reshape(count, body)
    if not prefix:
        return body_NT
    return np.concatenate([np.full((count, 1), prefix[0], np.int32), body_NT], axis=1)


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], need: int, seed: int
) -> np.ndarray:
    separator = document_separator(tokenizer)
    encoded: dict[int, np.ndarray] = {}
    pieces: list[np.ndarray] = []
    have, epoch = 0, 0
    while have < need:
        before = have
        order = list(range(len(documents)))
        random.Random(f"pack/{seed}/{epoch}").shuffle(order)
        for index in order:
            if index not in encoded:
                ids = tokenizer(documents[index], add_special_tokens=False, verbose=False).input_ids
                encoded[index] = np.array([separator, *ids] if ids else [], dtype=np.int32)
            pieces.append(encoded[index])
            have += len(encoded[index])
            if have >= need:
                break
        if have == before:
            raise UserError(
                f"the text holds no tokens ({len(documents)} documents); "
                "at least one non-empty document is needed; check --data"
            )
        epoch += 1
    return np.concatenate(pieces)[:need]


def split_documents(
    documents: Sequence[str], heldout_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """(train, heldout), disjoint by document; heldout gets about the fraction of the characters.

    Both sides get at least one document; a single document is cut in two at a line end.
    Exact duplicates are kept on one side. Raises UserError when there is no text.
    """
    unique = list(dict.fromkeys(documents))
    if not unique:
        raise UserError("no document to split; at least one is needed; check --data")
    if len(unique) == 1:
        unique = _halves(unique[0], heldout_fraction)
        documents = unique
        heldout_set = {unique[-1]} if len(unique) > 1 else set()
    else:
        heldout_set = _choose(unique, heldout_fraction, seed)
    train = [text for text in documents if text not in heldout_set]
    heldout = [text for text in documents if text in heldout_set]
    if not train or not heldout:
        raise UserError(
            "the text is too short to be split into training and held-out documents; "
            "at least two lines are needed; give more text with --data"
        )
    return train, heldout


def _choose(unique: list[str], fraction: float, seed: int) -> set[str]:
    order = list(unique)
    random.Random(f"split/{seed}").shuffle(order)
    goal = fraction * sum(map(len, order))
    chosen: set[str] = set()
    have = 0
    for text in order[: len(order) - 1]:
        if chosen and have + len(text) / 2 > goal:
            break
        chosen.add(text)
        have += len(text)
    return chosen


def _halves(text: str, fraction: float) -> list[str]:
    cut = text.rfind("\n", 0, max(1, round(len(text) * (1 - fraction)))) + 1
    return [part for part in (text[:cut], text[cut:]) if part.strip()]


def mix(text: TokenSet, fewshot: TokenSet, seed: int) -> TokenSet:
    """Both sets, each shuffled, interleaved; every prefix has the overall share (within 1)."""
    if len(text) == 0 or len(fewshot) == 0:
        return fewshot if len(text) == 0 else text
    if text.ids_NT.shape[1] != fewshot.ids_NT.shape[1]:
        raise ValueError(f"sequence lengths differ: {text.ids_NT.shape} {fewshot.ids_NT.shape}")
    rng = np.random.default_rng([seed, 0x6D6978])
    total = len(text) + len(fewshot)
    due = (np.arange(total + 1) * len(fewshot) + total // 2) // total
    is_fewshot = np.diff(due) > 0
    order = np.empty(total, dtype=np.int64)
    order[~is_fewshot] = rng.permutation(len(text))
    order[is_fewshot] = len(text) + rng.permutation(len(fewshot))
    ids_NT = np.concatenate([text.ids_NT, fewshot.ids_NT])[order]
    return TokenSet(ids_NT, np.concatenate([text.answer_NT, fewshot.answer_NT])[order])
