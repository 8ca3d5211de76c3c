"""Answers in OpenAI's shapes: whole objects, or chunks for server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from deploy.server_choice import Delta, TokenLogprob
from deploy.server_errors import ApiError
from deploy.server_protocol import Kind

DONE = b"data: [DONE]\n\n"
REPLACEMENT = "\ufffd"


class Answer:
    """Gathers the deltas of one request and writes them down.

    Args:
        token_text: the text of one token id, special tokens included.
        prompt_tokens: of each prompt once, however many choices it has.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        choices: int,
        prompt_tokens: int,
        token_text: Callable[[int], str],
    ) -> None:
        self.kind = kind
        self.model = model
        self.prompt_tokens = prompt_tokens
        self._token_text = token_text
        self._id = f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts = [""] * choices
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
        self._finishes: list[str | None] = [None] * choices
        self._generated = [0] * choices
        self._begun = [False] * choices

    def add(self, delta: Delta) -> None:
        """Note a delta; `body` and `usage` count it, `chunks` writes it."""
        self._texts[delta.choice] += delta.text
        self._logprobs[delta.choice] += delta.logprobs
        self._finishes[delta.choice] = delta.finish
        self._generated[delta.choice] = max(self._generated[delta.choice], delta.generated)

    @property
    def is_complete(self) -> bool:
        return all(finish is not None for finish in self._finishes)

    @property
    def usage(self) -> dict[str, int]:
        generated = sum(self._generated)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    def body(self) -> dict[str, Any]:
        """The whole answer of a request without streaming."""
        choices = []
        for index, text in enumerate(self._texts):
            content: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = self._written_logprobs(self._logprobs[index], 0)
            choices.append(self._choice(index, content, logprobs, self._finishes[index]))
        name = "text_completion" if self.kind == "completion" else "chat.completion"
        return {**self._head(name), "choices": choices, "usage": self.usage}

    def chunks(self, delta: Delta, with_usage: bool) -> bytes:
        """The event or events of one delta, which `add` has seen already."""
        index = delta.choice
        offset = len(self._texts[index]) - len(delta.text)
        logprobs = self._written_logprobs(delta.logprobs, offset)
        if self.kind == "completion":
            content: dict[str, Any] = {"text": delta.text}
        else:
            written = {"content": delta.text} if delta.text or not self._begun[index] else {}
            role = {} if self._begun[index] else {"role": "assistant"}
            content = {"delta": {**role, **written}}
            self._begun[index] = True
        choice = self._choice(index, content, logprobs, delta.finish)
        return self._event([choice], {"usage": None} if with_usage else {})

    def usage_chunk(self) -> bytes:
        """The event that `stream_options.include_usage` asks for."""
        return self._event([], {"usage": self.usage})

    def _event(self, choices: Sequence[dict[str, Any]], more: dict[str, Any]) -> bytes:
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        return event({**self._head(name), "choices": choices, **more})

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self.model}

    def _choice(
        self, index: int, content: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _written_logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> Any:
        if not tokens:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        texts = [self._token_text(token.token) for token in tokens]
        starts = [offset]
        for text in texts[:-1]:
            starts.append(starts[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token_text(other): value for other, value in token.top} for token in tokens
            ],
            "text_offset": starts,
        }

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(other, logprob) for other, logprob in token.top]
        return {**self._entry(token.token, token.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """`bytes` is null for a token that is only a part of a character."""
        text = self._token_text(token)
        is_part = REPLACEMENT in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if is_part else list(text.encode("utf-8")),
        }


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8") + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """How a stream that has begun tells of an error."""
    return event(error.body)
