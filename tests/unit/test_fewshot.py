"""Synthetic few-shot sequences: rules, answers, and that no probe function slipped in."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from distill.data import document_separator
from distill.fewshot import FORMATS, _encode_pieces, fewshot_sequences
from distill.fewshot_functions import FUNCTIONS, load_words

RULES_BY_HAND = {
    "pick_number": lambda question: next(w for w in question.split(", ") if w.isdigit()),
    "join_letters": lambda question: "".join(c for c in question if c.isalpha()),
    "word_length": lambda question: str(len(question)),
    "repeat_count": lambda question: str(len(question.split())),
    "odd_one": lambda question: min(question.split(), key=question.split().count),
}


def pairs_of(name: str, seed: int, count: int = 40) -> list[tuple[str, str]]:
    sample = FUNCTIONS[name](random.Random(seed), load_words())
    return [sample() for _ in range(count)]


def disagreements(name: str, pairs: list[tuple[str, str]]) -> int:
    return sum(RULES_BY_HAND[name](question) != answer for question, answer in pairs)


def test_there_are_enough_functions_formats_and_words() -> None:
    words = load_words()
    assert len(FUNCTIONS) >= 16
    assert len(set(FORMATS)) == len(FORMATS) >= 8
    assert len(words.words) >= 800
    assert len(words.relations) >= 5
    assert all(word.isalpha() and word.islower() for word in words.words)
    for name, relation in words.relations.items():
        assert len(relation) >= 20 and len(dict(relation)) == len(relation), name


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_are_functions(name: str) -> None:
    """Within one list equal inputs have equal outputs; other lists differ somewhere."""
    lists = [pairs_of(name, seed) for seed in range(8)]
    for pairs in lists:
        answers: dict[str, str] = {}
        for question, answer in pairs:
            assert question and answer and "\n" not in question + answer
            assert answers.setdefault(question, answer) == answer
    assert len({str(pairs) for pairs in lists}) == len(lists)


@pytest.mark.parametrize("name", sorted(RULES_BY_HAND))
def test_functions_do_what_they_say(name: str) -> None:
    pairs = pairs_of(name, 1)
    assert disagreements(name, pairs) == 0
    broken = [(question, pairs[n - 1][1]) for n, (question, _) in enumerate(pairs)]
    assert disagreements(name, broken) > 0


def probe_like(pairs: list[tuple[str, str]]) -> set[str]:
    """Which probe functions explain every pair of a list."""

    def words_only(question: str) -> bool:
        return ", " in question and question.replace(", ", "").isalpha()

    guesses = {
        "capitalise": lambda q: q.capitalize() if q.islower() else None,
        "first letter": lambda q: q[0] if q.isalpha() and len(q) > 1 else None,
        "last letter": lambda q: q[-1] if q.isalpha() and len(q) > 1 else None,
        "plural": lambda q: q + "s" if q.isalpha() else None,
        "past": lambda q: q + "ed" if q.isalpha() else None,
        "next": lambda q: str(int(q) + 1) if q.isdigit() else None,
        "previous": lambda q: str(int(q) - 1) if q.isdigit() else None,
        "first of three": lambda q: q.split(", ")[0] if ", " in q else None,
        "alphabetically first": lambda q: min(q.split(", ")) if words_only(q) else None,
    }
    return {name for name, guess in guesses.items() if all(guess(q) == a for q, a in pairs)}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_no_list_is_a_probe_function(name: str) -> None:
    for seed in range(60):
        assert not probe_like(pairs_of(name, seed, 25))


def test_the_probe_detector_detects() -> None:
    assert probe_like([("cat", "Cat"), ("dog", "Dog")]) == {"capitalise"}
    assert probe_like([("4", "5"), ("9", "10")]) == {"next"}
    assert probe_like([("b, a, c", "b"), ("z, q, r", "z")]) == {"first of three"}


def test_relations_are_no_probe_relations() -> None:
    """Spot checks of the probes' facts: none of these pairs may be in words.txt."""
    forbidden = {
        ("hot", "cold"), ("big", "small"), ("big", "large"), ("france", "paris"),
        ("japan", "tokyo"), ("japan", "yen"), ("walk", "walked"), ("go", "went"),
        ("cat", "cats"), ("monday", "tuesday"), ("dog", "chien"), ("dog", "perro"),
    }  # fmt: skip
    words = load_words()
    pairs = {(q.lower(), a.lower()) for relation in words.relations.values() for q, a in relation}
    assert not pairs & forbidden
    assert not pairs & {(answer, question) for question, answer in forbidden}


def test_sequences_are_seeded_full_and_prefix_stable(tiny_tokenizer) -> None:
    tokens = fewshot_sequences(tiny_tokenizer, 6, 200, seed=1)
    assert tokens.ids_NT.shape == (6, 200) and tokens.ids_NT.dtype == np.int32
    assert (tokens.ids_NT[:, 0] == document_separator(tiny_tokenizer)).all()
    again = fewshot_sequences(tiny_tokenizer, 3, 200, seed=1)
    assert np.array_equal(tokens.ids_NT[:3], again.ids_NT)
    assert np.array_equal(tokens.answer_NT[:3], again.answer_NT)
    assert not np.array_equal(
        fewshot_sequences(tiny_tokenizer, 3, 200, seed=2).ids_NT, again.ids_NT
    )
    assert 0.03 < tokens.answer_NT.mean() < 0.7


def answers_marked(tokenizer, monkeypatch: pytest.MonkeyPatch, shift: int = 0) -> list[str]:
    """Texts of the marked runs in a sequence of one list with known format and function."""
    monkeypatch.setattr("distill.fewshot.FORMATS", (("Q: ", "\nA: ", "\n\n"),))
    tokens = fewshot_sequences(tokenizer, 1, 300, seed=5, functions=["swap"])
    ids, marked = tokens.ids_NT[0], np.roll(tokens.answer_NT[0], 1 + shift)
    starts = np.flatnonzero(marked & ~np.roll(marked, 1))
    runs = []
    for start in starts:
        stop = start
        while stop < len(ids) and marked[stop]:
            stop += 1
        runs.append(tokenizer.decode(ids[start:stop]).strip())
    return runs


def expected_answers(tokenizer) -> list[str]:
    text = tokenizer.decode(fewshot_sequences(tokenizer, 1, 300, 5, ["swap"]).ids_NT[0])
    answers = []
    for one_list in text.split("<|endoftext|>")[1:]:
        answers += [
            pair.split("\nA: ")[1] for pair in one_list.split("\n\n")[1:] if "\nA: " in pair
        ]
    return [answer for answer in answers if answer]


def test_marks_are_the_answers_from_the_second_pair_on(tiny_tokenizer, monkeypatch) -> None:
    marked = answers_marked(tiny_tokenizer, monkeypatch)
    expected = expected_answers(tiny_tokenizer)
    assert len(expected) > 5
    assert marked[:-1] == expected[: len(marked) - 1] and len(expected) - len(marked) in (0, 1)
    shifted = answers_marked(tiny_tokenizer, monkeypatch, shift=1)
    assert shifted[:3] != expected[:3]


def test_pieces_mark_the_same_answers_without_offsets(tiny_tokenizer) -> None:
    text = "Q: a\nA: river\n\nQ: b\nA: the mill\n"
    start = text.index("the mill")
    ids, marks = _encode_pieces(tiny_tokenizer, text, [(start, start + len("the mill"))])
    assert tiny_tokenizer.decode(ids) == text
    marked = [token for token, mark in zip(ids, marks, strict=True) if mark]
    assert tiny_tokenizer.decode(marked).strip() == "the mill"


def test_unknown_function_is_refused() -> None:
    with pytest.raises(KeyError):
        fewshot_sequences(SimpleNamespace(), 1, 8, 0, functions=["antonym"])  # type: ignore[arg-type]


def test_no_relation_holds_a_pair_of_a_probe() -> None:
    """Nothing that the probes ask for may be in a training text, whatever its relation is."""
    from evaluate.probes import load_tasks

    asked = {(p.input.lower(), p.output.lower()) for task in load_tasks().values() for p in task}
    known = {
        (left.lower(), right.lower())
        for relation in load_words().relations.values()
        for left, right in relation
    }
    assert not asked & known
