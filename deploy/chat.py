"""A conversation on a terminal: what was said before is not computed again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deploy.decoding import PROMPT_COLUMNS, require_fit
from deploy.runner import Runner
from deploy.server_choice import Choice, Delta
from deploy.text import Text
from distill.commit import UserError

HELP = "type a message; /reset starts anew, Ctrl-C ends an answer, Ctrl-D ends the conversation"

MakeChoice = Callable[[Sequence[int]], Choice]


class Conversation:
    """Messages so far, and the cache of as much of their tokens as the next prompt shares."""

    def __init__(
        self, runner: Runner, text: Text, make_choice: MakeChoice, system: str | None = None
    ) -> None:
        self._runner, self._text, self._make_choice = runner, text, make_choice
        self._system = system
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._cache: Any = self._runner.new_cache(1)
        self._cached_ids: list[int] = []

    def ask(self, content: str, show: Callable[[str], None]) -> str:
        """Answer one message; `show` gets the pieces of text as they come.

        Raises: UserError when the conversation fills the model's context; the message is then
            taken back. A keyboard interrupt ends the answer, which is kept as far as it came.
        """
        self.messages.append({"role": "user", "content": content})
        try:
            prompt = self._text.apply_chat_template(self.messages)
            choice = self._make_choice(self._text.encode(prompt, add_special_tokens=False))
            require_fit(self._runner, [choice])
        except UserError:
            self.messages.pop()
            raise
        pieces: list[str] = []
        try:
            for delta in self._deltas(choice):
                pieces.append(delta.text)
                show(delta.text)
        except KeyboardInterrupt:
            show("…")
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _deltas(self, choice: Choice) -> Any:
        logits_V = self._started(choice.prompt)
        while True:
            delta: Delta = choice.accept(logits_V, 0.0)
            yield delta
            if delta.is_last:
                return
            logits_V = self._fed(choice.generated[-1:])

    def _started(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits [V] behind the prompt; only what the cache lacks is computed."""
        shortest = min(len(prompt) - 1, len(self._cached_ids), self._cache.length)
        pairs = zip(prompt[:shortest], self._cached_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
        self._cache = self._cache.truncate(same)
        del self._cached_ids[same:]
        for start in range(same, len(prompt), PROMPT_COLUMNS):
            logits_V = self._fed(prompt[start : start + PROMPT_COLUMNS])
        return logits_V

    def _fed(self, ids: Sequence[int]) -> np.ndarray:
        ids_1S = np.asarray([list(ids)], np.int64)
        logits_11V = self._runner.forward(ids_1S, self._cache, logits_to_keep=1)
        self._cached_ids += ids
        return logits_11V[0, -1]


def converse(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Read messages until the end of input. An answer that cannot be given costs one line."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            message = read("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if message == "/reset":
            conversation.reset()
        elif message:
            try:
                conversation.ask(message, _show)
                print(flush=True)
            except UserError as error:
                print(f"error: {error}; /reset starts anew", file=sys.stderr)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
