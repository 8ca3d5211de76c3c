"""From a checked request to the choices that the scheduler generates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.sampling import Sampler, SamplingSettings
from deploy.server_choice import Choice
from deploy.server_errors import ApiError
from deploy.server_protocol import ApiRequest, ModelLimits, SamplingFields
from deploy.text import StopStrings, Text
from distill.commit import UserError


@dataclass(frozen=True)
class Model:
    """The model served: its name, its texts, its limits. `context`: prompt and answer, tokens."""

    name: str
    text: Text
    context: int
    eos_token_ids: tuple[int, ...]
    limits: ModelLimits
    max_seconds: float
    created: int

    def prompts(self, request: ApiRequest) -> list[tuple[int, ...]]:
        """Token ids of every prompt. Raises: ApiError 400 for one without tokens or too long."""
        if request.kind == "chat":
            texts: Sequence[str | tuple[int, ...]] = [self._chat_text(request)]
        else:
            texts = request.prompts
        special = request.kind == "completion"
        prompts = [
            tuple(self.text.encode(prompt, add_special_tokens=special))
            if isinstance(prompt, str)
            else prompt
            for prompt in texts
        ]
        for prompt in prompts:
            self._check_length(prompt, request.max_tokens)
        return prompts

    def choices(
        self, request: ApiRequest, prompts: Sequence[tuple[int, ...]], sink: Any
    ) -> list[Choice]:
        """Every choice of a request, those of one prompt beside one another."""
        repeated = [prompt for prompt in prompts for _ in range(request.choices_per_prompt)]
        deadline_s = time.monotonic() + self.max_seconds
        return [
            Choice(
                index=index,
                prompt=prompt,
                max_new=self._max_new(prompt, request.max_tokens),
                sampler=Sampler(settings_of(request.sampling, index), prompt),
                detokenizer=self.text.detokenizer(prompt),
                stops=StopStrings(request.stops),
                end_tokens=() if request.ignore_eos else self.eos_token_ids,
                top_logprobs=request.top_logprobs,
                sink=sink,
                deadline_s=deadline_s,
            )
            for index, prompt in enumerate(repeated)
        ]

    def token_text(self, token: int) -> str:
        """The text of one token alone, special tokens included."""
        return self.text.decode([token], skip_special_tokens=False)

    def _chat_text(self, request: ApiRequest) -> str:
        if not self.text.has_chat_template:
            raise ApiError(
                400,
                "this model has no chat template; needs one for chats; use /v1/completions",
                code="no_chat_template",
            )
        try:
            return self.text.apply_chat_template(list(request.messages))
        except UserError as error:
            raise ApiError(
                400, f"messages: {error}", param="messages", code="chat_template"
            ) from None

    def _max_new(self, prompt: tuple[int, ...], asked: int | None) -> int:
        room = self.context - len(prompt)
        return min(room, self.limits.max_tokens) if asked is None else asked

    def _check_length(self, prompt: tuple[int, ...], asked: int | None) -> None:
        field = "prompt" if asked is None or len(prompt) >= self.context else "max_tokens"
        if not prompt:
            raise ApiError(
                400,
                "the prompt has no tokens; needs one at least; write something",
                param="prompt",
                code="empty_prompt",
            )
        if len(prompt) + (asked or 1) > self.context:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and the answer up to {asked or 1}; allowed "
                f"are {self.context} together; shorten the prompt or lower max_tokens",
                param=field,
                code="context_length_exceeded",
            )


def settings_of(fields: SamplingFields, index: int) -> SamplingSettings:
    """The sampler's settings; choices of one request have seeds of their own.

    OpenAI allows top_p 0, which leaves the likeliest token alone.
    """
    seed = None if fields.seed is None else (fields.seed + index) % 2**64
    greedy = fields.temperature == 0 or fields.top_p == 0
    return SamplingSettings(
        temperature=0.0 if greedy else fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p or 1.0,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        seed=seed,
    )
