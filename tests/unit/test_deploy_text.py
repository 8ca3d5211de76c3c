"""Text in and out: whole characters only, stop strings, chat templates as transformers'."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deploy.text import Detokenizer, StopStrings, Text, load_text
from distill.artifact import UserError

SAMPLES = (
    "The mill burned in 1874.",
    "naïve — déjà vu",
    "日本語のテキスト",
    "👩‍👩‍👧 ok 🇫🇷",
    "a\n\n\tb  ",
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello {{x}}"},
]


@pytest.fixture(scope="module")
def directory(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(directory: Path) -> Text:
    return load_text(directory)


@pytest.fixture(scope="module")
def byte_fallback() -> Text:
    """A tokenizer like Llama 2's: pieces with "▁", and single bytes for what has no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁mill", "a", "é"]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Text(tokenizer, {}, None)


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_are_whole_characters_and_make_the_text(text: Text, sample: str) -> None:
    ids = text.encode(sample, add_special_tokens=False)
    pieces = pieces_of(text.detokenizer(), ids)
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)


def test_one_byte_a_token_waits_for_the_character(text: Text) -> None:
    """The tiny tokenizer spells a flag in eight bytes: nothing comes before a character's last."""
    ids = text.encode("🇫🇷", add_special_tokens=False)
    assert len(ids) >= 8
    assert [bool(piece) for piece in pieces_of(text.detokenizer(), ids)].count(True) == 2
    with pytest.raises(AssertionError):  # the twin: decoding each token alone
        assert not any("\ufffd" in text.decode([token]) for token in ids)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_text_survives(text: Text, sample: str) -> None:
    ids = text.encode(sample, add_special_tokens=False)
    assert "".join(pieces_of(text.detokenizer(), ids)) == text.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_come_out_as_they_decode(text: Text, seed: int) -> None:
    """Bytes that are no UTF-8 at all: everything is given out in the end, in bounded pieces."""
    ids = random.Random(seed).choices(range(3, 300), k=200)
    pieces = pieces_of(text.detokenizer(), ids)
    assert "".join(pieces) == text.decode(ids)


def test_a_row_of_invalid_bytes_is_not_held_forever(text: Text) -> None:
    lone = text.tokenizer.token_to_id("Ã")  # the byte 0xC3, which begins a character
    detokenizer = text.detokenizer()
    out = "".join(detokenizer.push(lone) for _ in range(200))
    assert 180 <= len(out) <= 200
    assert out + detokenizer.flush() == "\ufffd" * 200


def test_special_tokens_have_no_text(text: Text) -> None:
    ids = [*text.encode("Hello", add_special_tokens=False), 2]
    assert "".join(pieces_of(text.detokenizer(), ids)) == "Hello"


def test_ids_beyond_the_tokenizer_have_no_text(text: Text) -> None:
    assert pieces_of(text.detokenizer(), [text.size + 5]) == ["", ""]


def test_a_prompt_gives_the_first_token_its_space(byte_fallback: Text) -> None:
    the, mill = (byte_fallback.tokenizer.token_to_id(p) for p in ("▁the", "▁mill"))
    assert byte_fallback.detokenizer([the]).push(mill) == " mill"
    assert byte_fallback.detokenizer().push(mill) == "mill"


@pytest.mark.parametrize("sample", ["the mill", "日本 the", "a👍a", "éaé"])
def test_byte_fallback_waits_too(byte_fallback: Text, sample: str) -> None:
    ids = byte_fallback.encode(sample, add_special_tokens=False)
    pieces = pieces_of(byte_fallback.detokenizer(), ids)
    assert "".join(pieces) == byte_fallback.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_long_stream_stays_quick(text: Text) -> None:
    """What is decoded again for each token does not grow with the answer."""
    detokenizer = text.detokenizer()
    for token in text.encode("The river rises in the hills. " * 50, add_special_tokens=False):
        detokenizer.push(token)
        assert len(detokenizer._ids) <= 20


@pytest.mark.parametrize(
    ("stops", "pieces", "expected", "stopped"),
    [
        ((), ["a", "b"], "ab", False),
        (("STOP",), ["go ", "ST", "OP now"], "go ", True),
        (("STOP",), ["STO", "RE"], "STORE", False),
        (("\n\n",), ["a\n", "b\n", "\nc"], "a\nb", True),
        (("abc", "bc"), ["xab", "cd"], "x", True),
        (("bc", "abc"), ["xab", "cd"], "x", True),
        (("aab",), ["aaa", "ab"], "aa", True),
        (("x",), ["", "", "x"], "", True),
        (("日本",), ["日", "本"], "", True),
    ],
)
def test_stop_strings(
    stops: tuple[str, ...], pieces: list[str], expected: str, stopped: bool
) -> None:
    watch, out, met = StopStrings(stops), "", False
    for piece in pieces:
        safe, met = watch.push(piece)
        out += safe
        if met:
            break
    assert (out + ("" if met else watch.flush()), met) == (expected, stopped)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=3), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_in_any_pieces(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what comes out is the text before the first stop string."""
    whole = "".join(pieces)
    ends = [whole[: whole.find(stop) + len(stop)] for stop in stops if stop in whole]
    watch, out = StopStrings(stops), ""
    for piece in pieces:
        safe, met = watch.push(piece)
        out += safe
        if met:
            break
    else:
        out += watch.flush()
    if not ends:
        assert out == whole
    else:
        assert whole.startswith(out) and not any(stop in out for stop in stops)
        assert len(out) < min(map(len, ends))


def test_chat_template_is_that_of_transformers(
    text: Text, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for prompted in (True, False):
        expected = tiny_tokenizer.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompted
        )
        assert text.apply_chat_template(MESSAGES, add_generation_prompt=prompted) == expected
    assert "{{x}}" in expected


TEMPLATE = """\
{{- bos_token }}
{% for m in messages %}
    {%- if loop.index0 == 5 %}{% break %}{% endif %}
    {{ m['role'] | upper }}: {{ m.content | trim | tojson }}
    {%- if m.role == 'assistant' %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}go{{ eos_token }}{% endif %}"""


def test_a_rich_template_is_rendered_as_transformers_does(
    directory: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": " é<b> "}] * 2
    expected = tiny_tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=TEMPLATE, add_generation_prompt=True
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert load_text(tmp_path).apply_chat_template(messages) == expected


def templated(text: Text, template: str | None) -> Text:
    return Text(text.tokenizer, text.config, template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for %}", "damaged"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content.x }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "may not"),
        ("{{ messages.append(1) }}", "may not"),
        ("{{ 1 / 0 }}", "refuses"),
    ],
)
def test_templates_that_fail_say_so_in_one_line(
    text: Text, template: str | None, said: str
) -> None:
    with pytest.raises(UserError) as error:
        templated(text, template).apply_chat_template(MESSAGES)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_templates_inside_the_tokenizer_config(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    for value, expected in (("one", "one"), (named, "Db")):
        settings = {"chat_template": value, "bos_token": {"content": "b"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_text(tmp_path).apply_chat_template(MESSAGES) == expected


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        load_text(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match="is damaged"):
        load_text(tmp_path)


def test_text_that_is_no_unicode(text: Text) -> None:
    with pytest.raises(UserError, match="valid Unicode"):
        text.encode("a\ud800b")


def test_several_texts_at_once(text: Text) -> None:
    assert text.encode_many(SAMPLES) == [text.encode(sample) for sample in SAMPLES]
