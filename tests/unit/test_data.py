"""Loading, splitting, packing and mixing of training text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.artifact import UserError
from distill.data import (
    TokenSet,
    document_separator,
    load_documents,
    mix,
    pack,
    plain,
    sequence_prefix,
    split_documents,
)
from distill.documents import detokenise_wikitext, split_text

DOCUMENTS = [f"The boat {n} carries {n * 7} stones past the mill." for n in range(40)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_jsonl_and_txt_are_read_in_order(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "  "}, {"text": "t\u2028wo", "other": 1}]
    first = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    raw = write(tmp_path / "b.jsonl", json.dumps({"text": "x\u2028y"}, ensure_ascii=False))
    second = write(tmp_path / "c.txt", "three\r\n<|endoftext|>\r\nfour\n")
    expected = ["one", "t\u2028wo", "x\u2028y", "three", "four"]
    assert load_documents([first, raw, second]) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", '{"text": " "}\n', "holds no text"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "ok\ncaf\xe9\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("torn.jsonl", '{"text": "a"}\n{"text": "b\n', "line 2 is not JSON"),
        ("list.jsonl", '{"text": "a"}\n\n["b"]\n', "line 3"),
        ("number.jsonl", '{"text": 3}\n', "line 1"),
        ("table.csv", "a,b\n", "no known kind"),
        ("folder.txt", None, "cannot be read"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        write(path, content)
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        load_documents([str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt cannot be read"):
        load_documents([str(tmp_path / "absent.txt")])


def test_wikitext_is_split_at_top_headings_only() -> None:
    text = (
        " \n = First = \n \n A , b @-@ c <unk> d . \n \n = = Part = = \n \n More . \n"
        " \n = Second <unk> = \n \n It 's 1 @,@ 000 . \n x = 3 = y \n"
    )
    documents = split_text(text)
    assert [document.split("\n")[0] for document in documents] == ["= First =", "= Second ="]
    assert "A, b-c d." in documents[0] and "More." in documents[0]
    assert "It's 1,000." in documents[1]


def test_detokenising_leaves_ordinary_text_alone() -> None:
    text = 'He said "no", then left (at 3.5 km).  Two spaces - kept.'
    assert detokenise_wikitext(text) == text
    assert detokenise_wikitext('" a " , b ( c ) .') == '"a", b (c).'


def test_shared_wikitext_has_sixty_articles(data_dir: Path) -> None:
    documents = load_documents([str(data_dir / "wikitext-2-valid.txt")])
    assert len(documents) == 60
    assert all(document.startswith("= ") for document in documents)
    assert not any("<unk>" in document or " @-@ " in document for document in documents)


def test_paragraphs_are_grouped_to_two_thousand_characters() -> None:
    paragraphs = [f"{n} " + "x" * 700 for n in range(10)]
    documents = split_text("\n \n\n".join(paragraphs))
    assert len(documents) == 4
    assert all(len(document) >= 2000 for document in documents[:-1])
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)


def test_hub_stream_stops_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    read: list[int] = []

    def fake(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return (read.append(n) or {"body": "x" * 40, "id": n} for n in range(1000))

    monkeypatch.setattr("datasets.load_dataset", fake)
    documents = load_documents(["hub:org/name:small:validation:body"], max_tokens=25)
    assert (len(documents), len(read)) == (3, 3)
    assert asked == [("org/name", "small", "validation", True)]
    with pytest.raises(UserError, match="no text field 'text'; it has body, id"):
        load_documents(["hub:org/name"])
    with pytest.raises(UserError, match="the form is"):
        load_documents(["hub:a:b:c:d:e"])


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise ConnectionError("first\nsecond")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"hub:x cannot be read \(first\)") as caught:
        load_documents(["hub:x"])
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(st.text("ab \n", min_size=1, max_size=30), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.6),
    seed=st.integers(0, 5),
)
def test_split_is_a_partition_by_document(documents: list[str], fraction: float, seed: int) -> None:
    if len(set(documents)) < 2:
        documents = [*documents, "another"]
    train, heldout = split_documents(documents, fraction, seed)
    assert train and heldout
    assert not set(train) & set(heldout)
    assert sorted([*train, *heldout]) == sorted(documents)
    assert (train, heldout) == split_documents(documents, fraction, seed)


def test_split_share_seed_and_single_document() -> None:
    train, heldout = split_documents(DOCUMENTS, 0.1, 0)
    assert len(heldout) == 4
    assert split_documents(DOCUMENTS, 0.1, 1)[1] != heldout
    train, heldout = split_documents(["\n".join(DOCUMENTS)], 0.1, 0)
    assert train[0] + heldout[0] == "\n".join(DOCUMENTS)
    for hopeless in ([], ["one line"]):
        with pytest.raises(UserError):
            split_documents(hopeless, 0.1, 0)


def test_pack_keeps_whole_documents_between_separators(tiny_tokenizer) -> None:
    ids_NT = pack(tiny_tokenizer, DOCUMENTS, 32, 32 * 12, seed=3)
    assert ids_NT.shape == (12, 32) and ids_NT.dtype == np.int32
    separator = document_separator(tiny_tokenizer)
    stream = ids_NT.ravel()
    assert stream[0] == separator
    pieces = np.split(stream, np.flatnonzero(stream == separator)[1:])
    texts = [tiny_tokenizer.decode(piece[1:]) for piece in pieces[:-1]]
    assert len(texts) > 5 and set(texts) <= set(DOCUMENTS)
    assert len(set(texts)) == len(texts)
    assert texts != [text for text in DOCUMENTS if text in texts]


def test_pack_is_seeded_and_cycles_in_fresh_orders(tiny_tokenizer) -> None:
    few = DOCUMENTS[:5]
    ids_NT = pack(tiny_tokenizer, few, 50, 5000, seed=0)
    assert ids_NT.shape == (100, 50)
    assert np.array_equal(ids_NT, pack(tiny_tokenizer, few, 50, 5000, seed=0))
    assert not np.array_equal(ids_NT, pack(tiny_tokenizer, few, 50, 5000, seed=1))
    texts = tiny_tokenizer.decode(ids_NT.ravel()).split("<|endoftext|>")[1:]
    epochs = [texts[start : start + 5] for start in range(0, 25, 5)]
    assert all(sorted(epoch) == sorted(few) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_pack_prefix_for_tokenizers_that_add_bos(tiny_tokenizer) -> None:
    assert sequence_prefix(tiny_tokenizer) == []

    class AddsBos:
        bos_token_id = 1
        eos_token_id = 2
        unk_token_id = None
        unk_token = None
        name_or_path = "adds-bos"

        def convert_tokens_to_ids(self, token: str) -> None:
            return None

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> object:
            ids = [5 + ord(letter) for letter in text]
            return type("Encoded", (), {"input_ids": [1, *ids] if add_special_tokens else ids})

    ids_NT = pack(AddsBos(), DOCUMENTS, 16, 160, seed=0)  # type: ignore[arg-type]
    assert ids_NT.shape == (10, 16) and (ids_NT[:, 0] == 1).all()
    assert (ids_NT[:, 1:] > 1).mean() > 0.9


def test_pack_refuses_text_without_tokens(tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="no tokens"):
        pack(tiny_tokenizer, ["", ""], 8, 16, seed=0)


@settings(deadline=None, max_examples=40)
@given(text=st.integers(0, 40), fewshot=st.integers(0, 40), seed=st.integers(0, 3))
def test_every_prefix_of_a_mix_has_the_share(text: int, fewshot: int, seed: int) -> None:
    first = plain(np.arange(text * 3, dtype=np.int32).reshape(text, 3))
    second = TokenSet(
        10_000 + np.arange(fewshot * 3, dtype=np.int32).reshape(fewshot, 3),
        np.ones((fewshot, 3), dtype=bool),
    )
    mixed = mix(first, second, seed)
    assert sorted(mixed.ids_NT[:, 0]) == sorted([*first.ids_NT[:, 0], *second.ids_NT[:, 0]])
    assert np.array_equal(mixed.answer_NT, mixed.ids_NT >= 10_000)
    if text and fewshot:
        seen = np.cumsum(mixed.answer_NT[:, 0])
        due = np.arange(1, len(mixed) + 1) * fewshot / (text + fewshot)
        assert np.abs(seen - due).max() <= 1
    assert np.array_equal(mixed.ids_NT, mix(first, second, seed).ids_NT)


def test_token_set_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="2-D"):
        TokenSet(np.zeros((2, 3), np.int32), np.zeros((2, 4), bool))
    with pytest.raises(ValueError, match="lengths differ"):
        mix(plain(np.zeros((2, 3), np.int32)), plain(np.zeros((2, 4), np.int32)), 0)
