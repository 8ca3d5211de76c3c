"""Synthetic few-shot sequences: lists of input/output pairs under random functions.

Each list has one function and one format, so the rule must be inferred from the list itself.
They put in-context learning (induction, copying, selection, mapping) into calibration and training
text. Axis legend: N sequences, T positions in a sequence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data import TokenSet, document_separator
from distill.fewshot_functions import FUNCTIONS, Vocabulary, load_words

FORMATS: tuple[tuple[str, str, str], ...] = (
    ("Q: ", "\nA: ", "\n\n"),
    ("Q: ", "\nA: ", "\n"),
    ("Question: ", "\nAnswer: ", "\n\n"),
    ("Input: ", "\nOutput: ", "\n\n"),
    ("Input: ", " Output: ", "\n"),
    ("input: ", ", output: ", "\n"),
    ("", " -> ", "\n"),
    ("", " => ", "\n"),
    ("", " → ", "\n"),
    ("", ": ", "\n"),
    ("", ":", "\n"),
    ("", " = ", "\n"),
    ("", " | ", "\n"),
    ("", "\t", "\n"),
    ("", " / ", "\n"),
    ("", " -> ", "; "),
    ("", "\n", "\n\n"),
    ("- ", ": ", "\n"),
    ("* ", " (", ")\n"),
    ("<", "> <", ">\n"),
    ("x: ", "\ny: ", "\n\n"),
    ("When I say ", ", you say ", ".\n"),
    ("The answer to ", " is ", ".\n"),
    ("User: ", "\nAssistant: ", "\n"),
)
PAIRS_PER_LIST = (10, 30)
RELATION_SHARE = 0.6
TOKEN_WORDS = 3000
_SPACE_MARKS = "Ġ▁"


def fewshot_sequences(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seq_len: int,
    seed: int,
    functions: Sequence[str] | None = None,
) -> TokenSet:
    """`count` sequences of `seq_len` tokens; sequence i depends on (seed, i) only.

    answer_NT[n, t] is True when token t+1 belongs to an answer, from the list's second pair on.
    `functions` restricts the rules to these names of FUNCTIONS. A document separator opens every
    list; the last list of a sequence is cut at its end. Raises KeyError on an unknown name.
    """
    names = list(FUNCTIONS) if functions is None else list(functions)
    for name in names:
        FUNCTIONS[name]
    vocabularies = _vocabularies(tokenizer)
    separator = document_separator(tokenizer)
    ids_NT = np.empty((count, seq_len), dtype=np.int32)
    answer_NT = np.zeros((count, seq_len), dtype=bool)
    for n in range(count):
        rng = random.Random(f"fewshot/{seed}/{n}")
        ids: list[int] = []
        is_answer: list[bool] = []
        while len(ids) < seq_len + 1:
            text, spans = _list_text(rng, rng.choice(vocabularies), _name(rng, names))
            more_ids, more_answer = _encode(tokenizer, text, spans)
            ids += [separator, *more_ids]
            is_answer += [False, *more_answer]
        ids_NT[n] = ids[:seq_len]
        answer_NT[n] = is_answer[1 : seq_len + 1]
    return TokenSet(ids_NT, answer_NT)


def _name(rng: random.Random, names: list[str]) -> str:
    """Facts get a fixed share because one entry stands for many relations."""
    if "relation" in names and (len(names) == 1 or rng.random() < RELATION_SHARE):
        return "relation"
    return rng.choice([name for name in names if name != "relation"])


def _vocabularies(tokenizer: PreTrainedTokenizerBase) -> list[Vocabulary]:
    """The word list, and the tokenizer's commonest whole-word tokens, plain and capitalised."""
    common = load_words()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    found = [common, common]
    for shape, limit in (("[a-z]{3,10}", TOKEN_WORDS), ("[A-Z][a-z]{3,9}", TOKEN_WORDS // 3)):
        pattern = re.compile(f"[{_SPACE_MARKS}]({shape})")
        words = tuple(m[1] for token, _ in tokens if (m := pattern.fullmatch(token)))[:limit]
        if len(words) >= 100:
            found.append(Vocabulary(words, common.relations))
    return found


def _list_text(
    rng: random.Random, vocabulary: Vocabulary, name: str
) -> tuple[str, list[tuple[int, int]]]:
    """One list's text and the character spans of its answers from the second pair on."""
    before, between, after = rng.choice(FORMATS)
    sample = FUNCTIONS[name](rng, vocabulary)
    text = ""
    spans: list[tuple[int, int]] = []
    for _ in range(rng.randint(*PAIRS_PER_LIST)):
        question, answer = sample()
        text += before + question + between
        spans.append((len(text), len(text) + len(answer)))
        text += answer + after
    return text, spans[1:]


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Token ids of the text, and which of them overlap an answer's span."""
    if not tokenizer.is_fast:
        return _encode_pieces(tokenizer, text, spans)
    inside = np.zeros(len(text) + 1, dtype=np.int64)
    for start, stop in spans:
        inside[start:stop] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return encoded["input_ids"], (before[offsets[:, 1]] > before[offsets[:, 0]]).tolist()


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Without offsets: the text is cut before each answer's space and after the answer."""
    ids: list[int] = []
    is_answer: list[bool] = []
    place = 0
    for start, stop in [*spans, (len(text), len(text))]:
        cut = start - (text[start - 1 : start] == " " and start < stop)
        for piece, flag in ((text[place:cut], False), (text[cut:stop], True)):
            piece_ids = tokenizer(piece, add_special_tokens=False).input_ids if piece else []
            ids += piece_ids
            is_answer += [flag] * len(piece_ids)
        place = stop
    return ids, is_answer
