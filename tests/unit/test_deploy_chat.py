"""Conversations: answers as without a cache, and only what is new is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deploy.chat import Conversation, converse
from deploy.runner import open_runner
from deploy.sampling import Sampler, SamplingSettings
from deploy.server_choice import Choice
from deploy.text import StopStrings, Text, load_text
from distill.artifact import UserError
from tests.deploy_engines import Engines, greedy_by_torch

ANSWER_TOKENS = 6


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture
def text(engines: Engines) -> Text:
    return load_text(engines.engine())


class Counting:
    """The runner, counting the columns that it computes."""

    def __init__(self, engines: Engines) -> None:
        self._runner: Any = open_runner(engines.engine(), threads=1)
        self.columns: list[int] = []
        self.interrupt_at: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, ids_BS: Any, cache: Any, **names: Any) -> Any:
        self.columns.append(ids_BS.shape[1])
        if len(self.columns) == self.interrupt_at:
            raise KeyboardInterrupt
        return self._runner.forward(ids_BS, cache, **names)


@pytest.fixture
def runner(engines: Engines) -> Counting:
    return Counting(engines)


@pytest.fixture
def conversation(runner: Counting, text: Text) -> Conversation:
    def make_choice(ids: Sequence[int]) -> Choice:
        return Choice(
            0, tuple(ids), ANSWER_TOKENS, Sampler(SamplingSettings(temperature=0.0)),
            text.detokenizer(ids), StopStrings(), runner.eos_token_ids, None, None, math.inf,
        )  # fmt: skip

    return Conversation(runner, text, make_choice, "Be brief.")  # type: ignore[arg-type]


def prompt_of(text: Text, messages: list[dict[str, str]]) -> list[int]:
    return text.encode(text.apply_chat_template(messages), add_special_tokens=False)


def expected_answer(engines: Engines, text: Text, messages: list[dict[str, str]]) -> str:
    ids = prompt_of(text, messages)
    tokens = greedy_by_torch(engines.model, ids, ANSWER_TOKENS)
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    return text.decode([*ids, *tokens]).removeprefix(text.decode(ids))


def test_every_turn_answers_as_from_scratch(
    engines: Engines, text: Text, conversation: Conversation, runner: Counting
) -> None:
    for turn, message in enumerate(("Hello", "And the river?", "And the mill?")):
        expected = expected_answer(
            engines, text, [*conversation.messages, {"role": "user", "content": message}]
        )
        runner.columns.clear()
        pieces: list[str] = []
        assert conversation.ask(message, pieces.append) == "".join(pieces) == expected
        whole = len(prompt_of(text, conversation.messages[:-1]))
        assert runner.columns[0] == whole if turn == 0 else runner.columns[0] < whole / 2


def test_a_cache_that_is_not_taken_back_would_show(
    engines: Engines, text: Text, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the last answer's tokens stay although the new prompt differs there."""
    conversation.ask("Hello", lambda piece: None)
    messages = [*conversation.messages[:1], {"role": "user", "content": "Count the boats"}]
    expected = expected_answer(engines, text, messages)
    conversation.messages = messages[:1]
    cache_type = type(conversation._cache)
    monkeypatch.setattr(cache_type, "truncate", lambda self, length: self)
    assert conversation.ask("Count the boats", lambda piece: None) != expected


def test_an_interrupt_keeps_what_was_said(
    engines: Engines, text: Text, conversation: Conversation, runner: Counting
) -> None:
    runner.interrupt_at = 4
    answer = conversation.ask("Hello", lambda piece: None)
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    assert answer == text.decode(text.encode(answer, add_special_tokens=False))
    runner.interrupt_at = None
    expected = expected_answer(
        engines, text, [*conversation.messages, {"role": "user", "content": "Go on"}]
    )
    assert conversation.ask("Go on", lambda piece: None) == expected


def test_a_full_context_takes_the_message_back(conversation: Conversation) -> None:
    before = list(conversation.messages)
    with pytest.raises(UserError, match="the model allows 512 together"):
        conversation.ask("river " * 400, lambda piece: None)
    assert conversation.messages == before


def test_the_terminal(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["Hello", "", "river " * 400, "/reset", "Hello"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(conversation, read)
    printed = capsys.readouterr()
    answers = printed.out.split("\n")
    assert printed.err.count("error: ") == 1 and "/reset starts anew" in printed.err
    assert len(conversation.messages) == 3
    assert printed.out.endswith("\n") and printed.out[: len(printed.out) // 2] * 2 == printed.out
    assert answers[0]
