"""Many prompts at once: as each alone, prefixes shared, rows leaving and joining."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import deploy.decoding
from deploy.decoding import decode
from deploy.runner import Runner, open_runner
from deploy.sampling import Sampler, SamplingSettings
from deploy.server_choice import Choice, Delta
from deploy.text import StopStrings, Text, load_text
from distill.artifact import UserError
from tests.deploy_engines import Engines, greedy_by_torch

START = list(range(40, 64))
PROMPTS = [[*START, 9, 8], [*START, 7], [*START, 90, 91, 92, 93], [*START, 5, 4, 3], [*START, 6]]
LENGTHS = [3, 12, 7, 1, 9]


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture
def runner(engines: Engines) -> Runner:
    return open_runner(engines.engine(), threads=1)


@pytest.fixture(scope="module")
def text(engines: Engines) -> Text:
    return load_text(engines.engine())


def choice_of(
    text: Text, index: int, prompt: Sequence[int], count: int, stops: Sequence[str] = (), **sampling
) -> Choice:
    settings = SamplingSettings(**{"temperature": 0.0, **sampling})
    return Choice(
        index, tuple(prompt), count, Sampler(settings, prompt), text.detokenizer(prompt),
        StopStrings(stops), (), None, None, math.inf,
    )  # fmt: skip


def test_answers_are_those_of_each_prompt_alone(
    engines: Engines, runner: Runner, text: Text
) -> None:
    expected = [
        greedy_by_torch(engines.model, prompt, count)
        for prompt, count in zip(PROMPTS, LENGTHS, strict=True)
    ]
    for size in (1, 2, 3, 8):
        choices = [
            choice_of(text, i, prompt, count)
            for i, (prompt, count) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
        ]
        told: list[tuple[int, Delta]] = []
        speed = decode(
            runner, choices, lambda c, d, told=told: told.append((c.index, d)), batch_size=size
        )
        assert [choice.generated for choice in choices] == expected
        assert sorted(i for i, d in told if d.is_last) == [0, 1, 2, 3, 4]
        for index, tokens in enumerate(expected):
            pieces = "".join(d.text for i, d in told if i == index)
            assert pieces == text.decode([*PROMPTS[index], *tokens]).removeprefix(
                text.decode(PROMPTS[index])
            )
        assert speed.prompt_tokens == sum(map(len, PROMPTS))
        assert speed.decoded_tokens == sum(LENGTHS) - len(LENGTHS)


def test_a_wrong_start_would_show(
    engines: Engines, runner: Runner, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a shared start that is a token too long for some."""
    right = deploy.decoding._shared_start
    monkeypatch.setattr(
        deploy.decoding, "_shared_start", lambda prompts: max(0, right(prompts) - 1)
    )
    test_answers_are_those_of_each_prompt_alone(engines, runner, text)
    monkeypatch.setattr(
        deploy.decoding,
        "_shared_start",
        lambda p: right(p) and min(right(p) + 1, min(map(len, p)) - 1),
    )
    prompts = [[*START, 9, 8], [*START, 7, 8]]
    choices = [choice_of(text, i, prompt, 8) for i, prompt in enumerate(prompts)]
    decode(runner, choices, lambda c, d: None, batch_size=2)
    assert choices[0].generated == greedy_by_torch(engines.model, prompts[0], 8)
    assert choices[1].generated != greedy_by_torch(engines.model, prompts[1], 8)


def test_the_shared_start_is_computed_once(runner: Runner, text: Text) -> None:
    columns: list[tuple[int, int]] = []
    forward = runner.forward

    def counted(ids_BS: np.ndarray, *rest, **names) -> np.ndarray:
        columns.append(ids_BS.shape)
        return forward(ids_BS, *rest, **names)

    runner.forward = counted  # type: ignore[method-assign]
    choices = [choice_of(text, i, prompt, 1) for i, prompt in enumerate(PROMPTS)]
    decode(runner, choices, lambda c, d: None, batch_size=5)
    assert columns == [(1, 24), (5, 4)]


def test_prompts_longer_than_a_pass(
    engines: Engines, runner: Runner, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy.decoding, "PROMPT_COLUMNS", 5)
    choices = [choice_of(text, i, prompt, 4) for i, prompt in enumerate(PROMPTS[:3])]
    decode(runner, choices, lambda c, d: None, batch_size=3)
    for choice in choices:
        assert choice.generated == greedy_by_torch(engines.model, choice.prompt, 4)


def test_stop_strings_end_an_answer(runner: Runner, text: Text) -> None:
    whole = choice_of(text, 0, PROMPTS[1], 30)
    pieces: list[str] = []
    decode(runner, [whole], lambda c, d: pieces.append(d.text))
    answer = "".join(pieces)
    stop = answer[6:9]
    pieces.clear()
    decode(runner, [choice_of(text, 0, PROMPTS[1], 30, [stop])], lambda c, d: pieces.append(d.text))
    assert "".join(pieces) == answer[: answer.find(stop)]


def test_a_seed_gives_the_same_answer_in_any_company(runner: Runner, text: Text) -> None:
    alone = choice_of(text, 0, PROMPTS[2], 10, temperature=1.0, seed=5)
    decode(runner, [alone], lambda c, d: None)
    crowd = [
        choice_of(text, i, prompt, 10, temperature=1.0, seed=3 + i)
        for i, prompt in enumerate(PROMPTS)
    ]
    decode(runner, crowd, lambda c, d: None, batch_size=5)
    assert crowd[2].generated == alone.generated
    assert len({tuple(c.generated) for c in crowd}) == 5


def test_prompts_that_do_not_fit(runner: Runner, text: Text) -> None:
    with pytest.raises(UserError, match="prompt 4 is empty"):
        decode(runner, [choice_of(text, 4, [], 3)], lambda c, d: None)
    with pytest.raises(UserError, match="has 500 tokens and may get 13 more; the model allows 512"):
        decode(runner, [choice_of(text, 0, [5] * 500, 13)], lambda c, d: None)


def test_an_engine_that_gives_no_numbers(runner: Runner, text: Text) -> None:
    forward = runner.forward
    runner.forward = lambda *a, **k: forward(*a, **k) * np.nan  # type: ignore[method-assign]
    with pytest.raises(UserError, match="a logit of nan"):
        decode(runner, [choice_of(text, 0, [5], 3)], lambda c, d: None)
