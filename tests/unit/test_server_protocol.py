"""Requests are read strictly: what is wrong is named, what is right is taken as it is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from deploy.server_answers import Answer
from deploy.server_choice import Delta, TokenLogprob
from deploy.server_errors import ApiError
from deploy.server_fields import parse_json
from deploy.server_metrics import Counter, Histogram, Metrics
from deploy.server_protocol import ApiRequest, ModelLimits, read_chat, read_completion
from deploy.server_requests import settings_of

LIMITS = ModelLimits(vocabulary=100, max_tokens=50)
USER = {"role": "user", "content": "hi"}
HALF_PAIR = json.loads('"\\ud800"')


def completion(**fields: Any) -> ApiRequest:
    return read_completion({"model": "m", "prompt": "hi", **fields}, LIMITS)


def chat(**fields: Any) -> ApiRequest:
    return read_chat({"model": "m", "messages": [USER], **fields}, LIMITS)


def test_defaults_are_openais() -> None:
    plain, talk = completion(), chat()
    assert plain.prompts == ("hi",) and plain.max_tokens == 16 and talk.max_tokens is None
    for request in (plain, talk):
        assert request.sampling.temperature == request.sampling.top_p == 1.0
        assert request.sampling.seed is None and request.top_logprobs is None
        assert request.choices_per_prompt == 1 and request.stops == ()
        assert not (request.stream or request.include_usage or request.ignore_eos)


def test_null_is_the_default() -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias", "logprobs")
    assert completion(**dict.fromkeys(names)) == completion()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": [5, 6]}, ((5, 6),)),
        ({"prompt": ["a", "b"]}, ("a", "b")),
        ({"prompt": [[5], [6, 7]]}, ((5,), (6, 7))),
        ({"prompt": ["a", [6, 7]]}, ("a", (6, 7))),
    ],
)
def test_prompts_of_every_form(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert completion(**fields).prompts == expected


def test_every_field_reaches_its_place() -> None:
    request = chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1, seed=-3, logit_bias={"4": 2.5}, stop=["x", "y"], n=3, stream=True,
        stream_options={"include_usage": True}, logprobs=True, top_logprobs=4, ignore_eos=True,
        max_completion_tokens=9, user="me", response_format={"type": "text"}, tools=[],
    )  # fmt: skip
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5, 0.9, 7, 0.1,
    )  # fmt: skip
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.repetition_penalty == 1.1 and sampling.logit_bias == {4: 2.5}
    assert request.stops == ("x", "y") and request.choices_per_prompt == 3
    assert request.stream and request.include_usage and request.ignore_eos
    assert request.top_logprobs == 4 and request.max_tokens == 9
    seeds = {settings_of(sampling, index).seed for index in range(3)}
    assert len(seeds) == 3 and all(seed is not None and seed >= 0 for seed in seeds)


def test_top_p_zero_means_greedy() -> None:
    assert settings_of(completion(top_p=0).sampling, 0).temperature == 0


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "developer", "content": parts, "name": "n"}
    assert chat(messages=[message]).messages == (
        {"role": "developer", "content": "ab", "name": "n"},
    )


WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("completion", "model", {"model": None}),
    ("completion", "model", {"model": 7}),
    ("completion", "model", {"model": HALF_PAIR}),
    ("completion", "prompt", {"prompt": None}),
    ("completion", "prompt", {"prompt": []}),
    ("completion", "prompt", {"prompt": [[]]}),
    ("completion", "prompt", {"prompt": {"a": 1}}),
    ("completion", "prompt", {"prompt": [100]}),
    ("completion", "prompt", {"prompt": [-1]}),
    ("completion", "prompt", {"prompt": [True]}),
    ("completion", "prompt", {"prompt": [1.5]}),
    ("completion", "prompt", {"prompt": HALF_PAIR}),
    ("completion", "prompt", {"prompt": ["a"] * 17}),
    ("completion", "n", {"prompt": ["a"] * 4, "n": 5}),
    ("completion", "n", {"n": 0}),
    ("completion", "n", {"n": 17}),
    ("completion", "n", {"n": True}),
    ("completion", "n", {"n": 10**400}),
    ("completion", "best_of", {"best_of": 3}),
    ("completion", "echo", {"echo": True}),
    ("completion", "suffix", {"suffix": "end"}),
    ("completion", "max_tokens", {"max_tokens": 0}),
    ("completion", "max_tokens", {"max_tokens": -1}),
    ("completion", "max_tokens", {"max_tokens": 51}),
    ("completion", "max_tokens", {"max_tokens": 16.0}),
    ("completion", "max_tokens", {"max_tokens": "16"}),
    ("completion", "temperature", {"temperature": -0.1}),
    ("completion", "temperature", {"temperature": 2.1}),
    ("completion", "temperature", {"temperature": float("nan")}),
    ("completion", "temperature", {"temperature": float("inf")}),
    ("completion", "temperature", {"temperature": True}),
    ("completion", "temperature", {"temperature": "hot"}),
    ("completion", "temperature", {"temperature": 10**400}),
    ("completion", "top_p", {"top_p": 1.1}),
    ("completion", "top_k", {"top_k": -1}),
    ("completion", "min_p", {"min_p": 2}),
    ("completion", "presence_penalty", {"presence_penalty": 3}),
    ("completion", "frequency_penalty", {"frequency_penalty": -3}),
    ("completion", "repetition_penalty", {"repetition_penalty": 0}),
    ("completion", "seed", {"seed": 2**63}),
    ("completion", "seed", {"seed": 1.5}),
    ("completion", "logit_bias", {"logit_bias": {"100": 1}}),
    ("completion", "logit_bias", {"logit_bias": {"x": 1}}),
    ("completion", "logit_bias", {"logit_bias": {"²": 1}}),
    ("completion", "logit_bias", {"logit_bias": {"1": 101}}),
    ("completion", "logit_bias", {"logit_bias": [1]}),
    ("completion", "stop", {"stop": [""]}),
    ("completion", "stop", {"stop": [1]}),
    ("completion", "stop", {"stop": ["a"] * 17}),
    ("completion", "stop", {"stop": "a" * 257}),
    ("completion", "stop", {"stop": HALF_PAIR}),
    ("completion", "stream", {"stream": 1}),
    ("completion", "stream_options", {"stream_options": {"include_usage": True}}),
    ("completion", "stream_options", {"stream": True, "stream_options": []}),
    ("completion", "include_usage", {"stream": True, "stream_options": {"include_usage": "y"}}),
    ("completion", "logprobs", {"logprobs": 6}),
    ("completion", "logprobs", {"logprobs": True}),
    ("completion", "temprature", {"temprature": 1}),
    ("completion", "messages", {"messages": [USER]}),
    ("chat", "messages", {"messages": None}),
    ("chat", "messages", {"messages": []}),
    ("chat", "messages", {"messages": ["hi"]}),
    ("chat", "messages", {"messages": [{"role": "king", "content": "hi"}]}),
    ("chat", "messages", {"messages": [{"role": [], "content": "hi"}]}),
    ("chat", "messages", {"messages": [{"role": "user"}]}),
    ("chat", "messages", {"messages": [{"role": "user", "content": 5}]}),
    ("chat", "messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("chat", "messages", {"messages": [{"role": "user", "content": HALF_PAIR}]}),
    ("chat", "extra", {"messages": [{**USER, "extra": 1}]}),
    ("chat", "tools", {"tools": [{"type": "function"}]}),
    ("chat", "response_format", {"response_format": {"type": "json_object"}}),
    ("chat", "top_logprobs", {"top_logprobs": 3}),
    ("chat", "top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("chat", "logprobs", {"logprobs": 3}),
    ("chat", "prompt", {"prompt": "hi"}),
]


@pytest.mark.parametrize(("kind", "param", "fields"), WRONG)
def test_a_wrong_field_is_named(kind: str, param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        (completion if kind == "completion" else chat)(**fields)
    error = refused.value
    assert error.status == 400 and error.param == param
    assert error.kind == "invalid_request_error"
    assert len(error.message) < 700 and "\n" not in error.message and ";" in error.message
    json.dumps(error.body).encode("utf-8")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"{} {}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_json(body)
    assert refused.value.status == 400 and refused.value.code == "invalid_json"


def test_a_number_beyond_floats_is_refused_where_it_is_used() -> None:
    with pytest.raises(ApiError):
        completion(**parse_json(b'{"temperature": 1e999}'))


def answer(kind: Any) -> Answer:
    return Answer(kind, "m", 1, 3, lambda token: "\ufffd" if token == 9 else f"t{token}")


def test_chunks_add_up_to_the_whole_answer() -> None:
    deltas = [Delta(0, "He", 1), Delta(0, "llo", 3), Delta(0, "", 4, finish="stop")]
    for kind in ("completion", "chat"):
        written = answer(kind)
        events = b""
        for delta in deltas:
            written.add(delta)
            events += written.chunks(delta, with_usage=True)
        chunks = [json.loads(line[6:]) for line in events.decode().split("\n\n") if line]
        assert all(chunk["usage"] is None for chunk in chunks)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
        if kind == "chat":
            assert choices[0]["delta"] == {"role": "assistant", "content": "He"}
            assert choices[2]["delta"] == {}
            assert written.body()["choices"][0]["message"]["content"] == "Hello"
        else:
            assert "".join(choice["text"] for choice in choices) == "Hello"
            assert written.body()["choices"][0]["text"] == "Hello"
        assert written.is_complete
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        assert written.body()["usage"] == json.loads(written.usage_chunk()[6:])["usage"] == usage


def test_logprobs_in_both_forms() -> None:
    found = (TokenLogprob(4, -0.5, ((4, -0.5), (9, -1.5))), TokenLogprob(5, -0.25, ()))
    plain, talk = answer("completion"), answer("chat")
    for written in (plain, talk):
        written.add(Delta(0, "t4t5", 2, found, "length"))
    logprobs = plain.body()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["t4", "t5"] and logprobs["token_logprobs"] == [-0.5, -0.25]
    assert logprobs["text_offset"] == [0, 2] and logprobs["top_logprobs"][0]["t4"] == -0.5
    content = talk.body()["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [116, 52] and content[0]["top_logprobs"][1]["bytes"] is None


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.requests.add(2, 'a"b\\c\n', "200")
    metrics.first_token.observe(0.02)
    metrics.first_token.observe(1000)
    sample = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\["\\n])*",?)+\})? (\+Inf|[-+0-9.e]+)')
    for line in metrics.text().splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line), line
    assert 'first_token_seconds_bucket{le="0.025"} 1' in metrics.text()
    assert 'first_token_seconds_bucket{le="+Inf"} 2' in metrics.text()


def test_histograms_count_up_to_and_including_their_bounds() -> None:
    histogram = Histogram("h", "text", (1, 2))
    for seconds in (1, 1.5, 2, 3):
        histogram.observe(seconds)
    assert [line.split()[-1] for line in histogram.lines()] == ["1", "3", "4", "7.5", "4"]
    counter = Counter("c", "text", ("kind",))
    assert counter.lines() == []
