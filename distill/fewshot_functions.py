"""Random functions for the synthetic few-shot lists.

Each entry of FUNCTIONS takes (rng, vocabulary), draws the function's own constants, and returns a
sampler: every call of it gives one (input, output) pair. None of the functions of the evaluation
probes is here, nor one whose first answer token is theirs: no antonym, synonym, capital, currency,
past tense, plural, capitalisation, first or last letter, next or previous item, translation,
choosing the first of several, the animal or the alphabetically first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Pair = tuple[str, str]
Sampler = Callable[[], Pair]
Relation = tuple[Pair, ...]
WORDS_FILE = Path(__file__).with_name("words.txt")


@dataclass(frozen=True)
class Vocabulary:
    """Words a list draws from, and fixed relations between words (name -> pairs)."""

    words: tuple[str, ...]
    relations: dict[str, Relation]


Factory = Callable[[random.Random, Vocabulary], Sampler]


@cache
def load_words(path: Path = WORDS_FILE) -> Vocabulary:
    """Parse words.txt: `[words]` of words, `[relation NAME]` of `input = output` entries."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[] "), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    words = tuple(dict.fromkeys(" ".join(sections.pop("words")).split()))
    relations = {
        name.removeprefix("relation "): _entries(" ".join(rows)) for name, rows in sections.items()
    }
    return Vocabulary(words, relations)


def _entries(text: str) -> Relation:
    halves = (entry.split("=") for entry in text.split(",") if "=" in entry)
    return tuple((left.strip(), right.strip()) for left, right in halves)


def _copy(rng: random.Random, v: Vocabulary) -> Sampler:
    times = rng.choice((1, 1, 2, 3))
    return lambda: (w := rng.choice(v.words), " ".join([w] * times))


def _phrase_copy(rng: random.Random, v: Vocabulary) -> Sampler:
    return lambda: (" ".join(p := rng.sample(v.words, 2)), " ".join(p))


def _random_map(rng: random.Random, v: Vocabulary) -> Sampler:
    size = rng.randint(3, 8)
    drawn = rng.sample(v.words, 2 * size)
    table = list(zip(drawn[:size], drawn[size:], strict=True))
    return lambda: rng.choice(table)


def _random_label(rng: random.Random, v: Vocabulary) -> Sampler:
    labels = rng.sample(v.words, rng.randint(2, 3))
    table = [(word, rng.choice(labels)) for word in rng.sample(v.words, 8)]
    return lambda: rng.choice(table)


def _constant(rng: random.Random, v: Vocabulary) -> Sampler:
    answer = rng.choice(v.words)
    return lambda: (rng.choice(v.words), answer)


def _prefix(rng: random.Random, v: Vocabulary) -> Sampler:
    head, joint = rng.choice(v.words), rng.choice((" ", " ", "-", " of "))
    return lambda: (w := rng.choice(v.words), head + joint + w)


def _suffix(rng: random.Random, v: Vocabulary) -> Sampler:
    tail, joint = rng.choice(v.words), rng.choice((" ", " ", "-", " and "))
    return lambda: (w := rng.choice(v.words), w + joint + tail)


def _wrap(rng: random.Random, v: Vocabulary) -> Sampler:
    left, right = rng.choice((("(", ")"), ('"', '"'), ("[", "]"), ("**", "**"), ("{", "}")))
    return lambda: (w := rng.choice(v.words), left + w + right)


def _strip_word(rng: random.Random, v: Vocabulary) -> Sampler:
    """A fixed frame around the word: "the door is here" -> "door"."""
    before, after = rng.sample(v.words, 2)
    return lambda: (f"{before} {(w := rng.choice(v.words))} {after}", w)


def _swap(rng: random.Random, v: Vocabulary) -> Sampler:
    joint = rng.choice((" ", ", ", " and ", " / "))
    return lambda: (joint.join(p := rng.sample(v.words, 2)), joint.join(p[::-1]))


def _reverse(rng: random.Random, v: Vocabulary) -> Sampler:
    count, joint = rng.randint(3, 4), rng.choice((" ", ", "))
    return lambda: (joint.join(p := rng.sample(v.words, count)), joint.join(p[::-1]))


def _pick_kth(rng: random.Random, v: Vocabulary) -> Sampler:
    """Second, third, ... or last of several; never the first, which is a probe."""
    count, joint = rng.randint(2, 5), rng.choice((", ", " ", " | "))
    place = rng.randint(1, count - 1)
    return lambda: (joint.join(p := rng.sample(v.words, count)), p[place])


def _pick_letter(rng: random.Random, v: Vocabulary) -> Sampler:
    count = rng.randint(3, 5)
    place = rng.randint(1, count - 1)
    return lambda: (", ".join(p := rng.sample("abcdefghijklmnopqrstuvwxyz", count)), p[place])


def _pick_marked(rng: random.Random, v: Vocabulary) -> Sampler:
    count, mark = rng.randint(3, 4), rng.choice(("*", "#", ">", "!", "the "))

    def sample() -> Pair:
        items, place = rng.sample(v.words, count), rng.randrange(count)
        return ", ".join(mark * (i == place) + w for i, w in enumerate(items)), items[place]

    return sample


def _pick_number(rng: random.Random, v: Vocabulary) -> Sampler:
    count = rng.randint(2, 4)

    def sample() -> Pair:
        items, number = rng.sample(v.words, count), str(rng.randint(2, 99))
        items[rng.randrange(count)] = number
        return ", ".join(items), number

    return sample


def _pick_member(rng: random.Random, v: Vocabulary) -> Sampler:
    """One of the items belongs to a small fixed set that only the examples reveal."""
    members = rng.sample(v.words, 4)

    def sample() -> Pair:
        items, answer = rng.sample(v.words, 3), rng.choice(members)
        items[rng.randrange(3)] = answer
        return ", ".join(items), answer

    return sample


def _odd_one(rng: random.Random, v: Vocabulary) -> Sampler:
    def sample() -> Pair:
        common, odd = rng.sample(v.words, 2)
        items = [common] * 3
        items[rng.randrange(3)] = odd
        return " ".join(items), odd

    return sample


def _lookup(rng: random.Random, v: Vocabulary) -> Sampler:
    count, by_value = rng.randint(2, 4), rng.random() < 0.3

    def sample() -> Pair:
        keys, values = rng.sample(v.words, count), rng.sample(v.words, count)
        asked, given = (values, keys) if by_value else (keys, values)
        place = rng.randrange(count)
        listing = ", ".join(f"{k}={x}" for k, x in zip(keys, values, strict=True))
        return f"{listing}; {asked[place]}", given[place]

    return sample


def _two_labels(rng: random.Random, v: Vocabulary) -> list[str]:
    ready = (["yes", "no"], ["true", "false"], ["A", "B"], ["1", "0"], rng.sample(v.words, 2))
    labels = list(rng.choice(ready))
    rng.shuffle(labels)
    return labels


def _member(rng: random.Random, v: Vocabulary) -> Sampler:
    labels, count = _two_labels(rng, v), rng.randint(2, 4)

    def sample() -> Pair:
        items, inside = rng.sample(v.words, count), rng.random() < 0.5
        word = rng.choice(items) if inside else rng.choice(v.words)
        return f"{word} in {', '.join(items)}", labels[word not in items]

    return sample


def _same(rng: random.Random, v: Vocabulary) -> Sampler:
    labels = _two_labels(rng, v)

    def sample() -> Pair:
        first, other = rng.sample(v.words, 2)
        second = first if rng.random() < 0.5 else other
        return f"{first} {second}", labels[first != second]

    return sample


def _contains_letter(rng: random.Random, v: Vocabulary) -> Sampler:
    labels, letter = _two_labels(rng, v), rng.choice("aeiorst")
    return lambda: (w := rng.choice(v.words), labels[letter not in w.lower()])


def _threshold(rng: random.Random, v: Vocabulary) -> Sampler:
    labels, limit = _two_labels(rng, v), rng.randint(20, 80)
    return lambda: (str(n := rng.randint(1, 99)), labels[n > limit])


def _parity(rng: random.Random, v: Vocabulary) -> Sampler:
    labels = _two_labels(rng, v)
    return lambda: (str(n := rng.randint(1, 99)), labels[n % 2])


def _add(rng: random.Random, v: Vocabulary) -> Sampler:
    """n + d; d = 1 and d = -1 are left out (next and previous item)."""
    step = rng.choice([d for d in range(-9, 21) if abs(d) > 1])
    return lambda: (str(n := rng.randint(10, 99)), str(n + step))


def _multiply(rng: random.Random, v: Vocabulary) -> Sampler:
    factor = rng.choice((2, 3, 4, 5, 10))
    return lambda: (str(n := rng.randint(2, 20)), str(n * factor))


def _extreme_number(rng: random.Random, v: Vocabulary) -> Sampler:
    choose, count = rng.choice((max, min)), rng.randint(2, 4)
    return lambda: (", ".join(map(str, p := rng.sample(range(1, 99), count))), str(choose(p)))


def _sum(rng: random.Random, v: Vocabulary) -> Sampler:
    sign = rng.choice((" + ", " and ", ", "))
    return lambda: (f"{(a := rng.randint(1, 20))}{sign}{(b := rng.randint(1, 20))}", str(a + b))


def _word_length(rng: random.Random, v: Vocabulary) -> Sampler:
    return lambda: (w := rng.choice(v.words), str(len(w)))


def _item_count(rng: random.Random, v: Vocabulary) -> Sampler:
    joint = rng.choice((", ", " "))
    return lambda: (joint.join(p := rng.sample(v.words, rng.randint(1, 6))), str(len(p)))


def _repeat_count(rng: random.Random, v: Vocabulary) -> Sampler:
    return lambda: (" ".join([rng.choice(v.words)] * (n := rng.randint(1, 6))), str(n))


def _repeat_letter(rng: random.Random, v: Vocabulary) -> Sampler:
    times = rng.randint(2, 4)
    return lambda: (c := rng.choice("abcdefghijklmnopqrstuvwxyz"), " ".join([c] * times))


def _join_letters(rng: random.Random, v: Vocabulary) -> Sampler:
    joint = rng.choice((" ", "-", ", "))
    return lambda: (joint.join(w := rng.choice(v.words)), w)


def _longer_word(rng: random.Random, v: Vocabulary) -> Sampler:
    choose = rng.choice((max, min))

    def sample() -> Pair:
        first, second = rng.sample(v.words, 2)
        while len(first) == len(second):
            first, second = rng.sample(v.words, 2)
        return f"{first}, {second}", choose(first, second, key=len)

    return sample


def _mapped_word(rng: random.Random, v: Vocabulary) -> Sampler:
    """A random map used inside a phrase: the second word decides the answer, the first is noise."""
    inner = _random_map(rng, v)

    def sample() -> Pair:
        key, value = inner()
        return f"{rng.choice(v.words)} {key}", value

    return sample


def _relation(rng: random.Random, v: Vocabulary) -> Sampler:
    """A plain fact or a word form that no probe asks for, each pair once before any repeats."""
    pairs = list(rng.choice(list(v.relations.values())))
    rng.shuffle(pairs)
    waiting = pairs.copy()

    def sample() -> Pair:
        if not waiting:
            waiting.extend(pairs)
        return waiting.pop()

    return sample


FUNCTIONS: dict[str, Factory] = {
    "copy": _copy,
    "phrase_copy": _phrase_copy,
    "random_map": _random_map,
    "random_label": _random_label,
    "constant": _constant,
    "prefix": _prefix,
    "suffix": _suffix,
    "wrap": _wrap,
    "strip_word": _strip_word,
    "swap": _swap,
    "reverse": _reverse,
    "pick_kth": _pick_kth,
    "pick_letter": _pick_letter,
    "pick_marked": _pick_marked,
    "pick_number": _pick_number,
    "pick_member": _pick_member,
    "odd_one": _odd_one,
    "lookup": _lookup,
    "member": _member,
    "same": _same,
    "contains_letter": _contains_letter,
    "threshold": _threshold,
    "parity": _parity,
    "add": _add,
    "multiply": _multiply,
    "extreme_number": _extreme_number,
    "sum": _sum,
    "word_length": _word_length,
    "item_count": _item_count,
    "repeat_count": _repeat_count,
    "repeat_letter": _repeat_letter,
    "join_letters": _join_letters,
    "longer_word": _longer_word,
    "mapped_word": _mapped_word,
    "relation": _relation,
}
