"""OpenAI's request bodies, read strictly into one dataclass for both kinds of completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deploy.server_errors import ApiError, bad_field
from deploy.server_fields import Fields, checked_number, checked_text

Kind = Literal["completion", "chat"]

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_MESSAGES = 4096
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
COMPLETION_LOGPROBS = 5
CHAT_LOGPROBS = 20
SEED_LIMIT = 2**63 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")
WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
)  # fmt: skip


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against: the model's vocabulary and the most tokens an answer."""

    vocabulary: int
    max_tokens: int


@dataclass(frozen=True)
class SamplingFields:
    """How tokens are drawn; 0 and 1 are the values that change nothing. `top_k` 0: off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ApiRequest:
    """A checked request.

    `prompts`: texts or token ids, one choice each (empty for a chat, which has `messages`).
    `top_logprobs`: None without log-probabilities, else the alternatives at each position.
    """

    kind: Kind
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...]
    choices_per_prompt: int
    max_tokens: int | None
    sampling: SamplingFields
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    ignore_eos: bool


def read_completion(body: Mapping[str, Any], limits: ModelLimits) -> ApiRequest:
    """A body of POST /v1/completions. Raises: ApiError 400."""
    fields = Fields(body)
    common = _common(fields, limits)
    prompts = _prompts(fields.take("prompt"), limits.vocabulary)
    choices = common["choices_per_prompt"]
    if len(prompts) * choices > MAX_CHOICES:
        asked = len(prompts) * choices
        raise bad_field("n", asked, f"at most {MAX_CHOICES} choices, prompts times n, a request")
    fields.only("best_of", choices)
    fields.only("echo", False)
    fields.only("suffix", "")
    max_tokens = fields.whole("max_tokens", 1, limits.max_tokens, default=COMPLETION_TOKENS)
    logprobs = fields.whole("logprobs", 0, COMPLETION_LOGPROBS)
    fields.finish()
    return ApiRequest(
        kind="completion", prompts=prompts, messages=(), top_logprobs=logprobs,
        max_tokens=min(max_tokens or COMPLETION_TOKENS, limits.max_tokens), **common,
    )  # fmt: skip


def read_chat(body: Mapping[str, Any], limits: ModelLimits) -> ApiRequest:
    """A body of POST /v1/chat/completions. Raises: ApiError 400."""
    fields = Fields(body)
    common = _common(fields, limits)
    messages = _messages(fields.take("messages"))
    older = fields.whole("max_tokens", 1, limits.max_tokens)
    newer = fields.whole("max_completion_tokens", 1, limits.max_tokens)
    wants_logprobs = fields.switch("logprobs")
    alternatives = fields.whole("top_logprobs", 0, CHAT_LOGPROBS)
    if alternatives is not None and not wants_logprobs:
        raise bad_field("top_logprobs", alternatives, "a number only beside logprobs: true")
    _refuse_what_chat_lacks(fields)
    fields.finish()
    return ApiRequest(
        kind="chat", prompts=(), messages=messages,
        max_tokens=older if newer is None else newer,
        top_logprobs=(alternatives or 0) if wants_logprobs else None, **common,
    )  # fmt: skip


def _common(fields: Fields, limits: ModelLimits) -> dict[str, Any]:
    """The fields that both kinds share, by the names of `ApiRequest`."""
    stream = fields.switch("stream")
    fields.ignore(*WITHOUT_EFFECT)
    return {
        "model": fields.text("model", required=True),
        "choices_per_prompt": fields.whole("n", 1, MAX_CHOICES, default=1),
        "sampling": _sampling(fields, limits.vocabulary),
        "stops": _stops(fields.take("stop")),
        "stream": stream,
        "include_usage": _include_usage(fields.take("stream_options"), stream),
        "ignore_eos": fields.switch("ignore_eos"),
    }


def _sampling(fields: Fields, vocabulary: int) -> SamplingFields:
    return SamplingFields(
        temperature=fields.number("temperature", 0, 2, 1.0),
        top_p=fields.number("top_p", 0, 1, 1.0),
        top_k=fields.whole("top_k", 0, vocabulary, default=0) or 0,
        min_p=fields.number("min_p", 0, 1, 0.0),
        presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 10, 1.0),
        seed=fields.whole("seed", -SEED_LIMIT, SEED_LIMIT),
        logit_bias=_biases(fields.take("logit_bias"), vocabulary),
    )


def _biases(value: Any, vocabulary: int) -> dict[int, float]:
    if value is None:
        return {}
    allowed = f"an object of at most {MAX_BIASES} token ids below {vocabulary}"
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise bad_field("logit_bias", value, allowed)
    biases = {}
    for key, bias in value.items():
        is_number = key.isascii() and key.isdigit() and len(key) <= 10
        if not is_number or int(key) >= vocabulary:
            raise bad_field("logit_bias", key, allowed)
        biases[int(key)] = checked_number("logit_bias", bias, -100, 100)
    return biases


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    allowed = f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters"
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise bad_field("stop", value, allowed)
    for stop in stops:
        if not 1 <= len(checked_text("stop", stop)) <= MAX_STOP_CHARACTERS:
            raise bad_field("stop", stop, allowed)
    return tuple(stops)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_field("stream_options", value, "an object only beside stream: true")
    if not isinstance(value, dict):
        raise bad_field("stream_options", value, 'an object such as {"include_usage": true}')
    options = Fields(value)
    include = options.switch("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    return include


def _prompts(value: Any, vocabulary: int) -> tuple[str | tuple[int, ...], ...]:
    """One text, one list of ids, a list of texts or a list of lists of ids."""
    allowed = f"text, token ids, or a list of 1 to {MAX_CHOICES} of these"
    if isinstance(value, str):
        return (checked_text("prompt", value),)
    if not isinstance(value, list) or not value:
        raise bad_field("prompt", value, allowed)
    if all(isinstance(item, int) for item in value):
        return (_ids(value, vocabulary),)
    if len(value) > MAX_CHOICES:
        raise bad_field("prompt", value, allowed)
    return tuple(
        _ids(item, vocabulary) if isinstance(item, list) else checked_text("prompt", item)
        for item in value
    )


def _ids(value: list[Any], vocabulary: int) -> tuple[int, ...]:
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise bad_field("prompt", token, f"token ids from 0 to {vocabulary - 1}")
    if not value:
        raise bad_field("prompt", value, "at least one token id")
    return tuple(value)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise bad_field("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(item) for item in value)


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise bad_field("messages", value, 'objects such as {"role": "user", "content": "…"}')
    fields = Fields(value)
    role = fields.take("role")
    if role not in ROLES:
        raise bad_field("messages", role, f"a role out of {', '.join(ROLES)}")
    message = {"role": str(role), "content": _content(fields.take("content"))}
    name = fields.text("name")
    if name is not None:
        message["name"] = name
    fields.ignore("tool_call_id", "refusal", "annotations", "audio")
    fields.only("tool_calls", [])
    fields.only("function_call")
    fields.finish()
    return message


def _content(value: Any) -> str:
    """Text, or the joined texts of a list of text parts."""
    if isinstance(value, str):
        return checked_text("messages", value)
    allowed = 'content that is text or a list of {"type": "text", "text": "…"}'
    if not isinstance(value, list) or not value:
        raise bad_field("messages", value, allowed)
    parts = []
    for part in value:
        is_text = isinstance(part, dict) and set(part) == {"type", "text"}
        if not is_text or part["type"] != "text":
            raise bad_field("messages", part, allowed)
        parts.append(checked_text("messages", part["text"]))
    return "".join(parts)


def _refuse_what_chat_lacks(fields: Fields) -> None:
    fields.only("tools", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("functions", [])
    fields.only("function_call", "none", "auto")
    fields.only("response_format", {"type": "text"})
    fields.only("modalities", ["text"])
    fields.only("audio")
    fields.only("prediction")


def unknown_model(received: str, served: str) -> ApiError:
    """404: the request names a model that is not the one served here."""
    return ApiError(
        404,
        f"the model {ascii(received)[:80]} does not exist; this server serves {served!r}; "
        "name that one, or see GET /v1/models",
        param="model",
        code="model_not_found",
    )
