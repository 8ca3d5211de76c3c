"""Text in and out of an engine without transformers: tokenizer, streaming detokeniser, stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.commit import UserError, read_json

TOKENIZER = "tokenizer.json"
REMEDY = "export the student again with: python -m export --run RUN --overwrite"
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no UTF-8, or not yet
CONTEXT_TOKENS = 8  # decoded again before new tokens: how a token reads depends on the one before
HELD_TOKENS = 16  # no character is longer in tokens: later, invalid bytes are given out as they are


class Text:
    """The tokenizer of an engine directory and its chat template."""

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], template: str | None) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._template_source = template
        self._template: Any = None

    @property
    def size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens`: whatever the tokenizer puts around a text (often a
        first token); False for what a chat template has rendered, which holds them already.

        Raises: UserError for text that is no Unicode (lone surrogates).
        """
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(
                f"a text of {len(text)} characters cannot be encoded ({error}); needs valid "
                "Unicode; correct the text"
            ) from None

    def encode_many(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids beyond the tokenizer's have none."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A stream of text that continues the prompt."""
        return Detokenizer(self, prompt_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation: encode it with `add_special_tokens=False`.

        Args:
            messages: each with "role" and "content".
            variables: further names for the template, e.g. `tools`, `enable_thinking`.
        Raises: UserError when there is no template or it refuses the messages.
        """
        from deploy.chat_template import compile_template, render

        if self._template_source is None:
            raise UserError(
                "this model has no chat template; needs chat_template.jinja beside the "
                "tokenizer; give a plain prompt instead"
            )
        if self._template is None:
            self._template = compile_template(self._template_source)
        names = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **_special_tokens(self.config),
            **variables,
        }
        return render(self._template, names)


class Detokenizer:
    """Text from token ids as they come: what is given out never changes and is whole characters.

    Special tokens have no text.
    """

    def __init__(self, text: Text, prompt_ids: Sequence[int] = ()) -> None:
        self._text = text
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._told = len(self._ids)  # how many of _ids have been given out as text
        self._shown = 0  # characters of the decoded _ids that are out already

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character lacks bytes."""
        if len(self._ids) == self._told:
            self._shown = len(self._text.decode(self._ids))
        self._ids.append(token)
        decoded = self._text.decode(self._ids)
        sure = decoded.rstrip(REPLACEMENT)
        waited = len(self._ids) - self._told
        if len(sure) < len(decoded) and waited > HELD_TOKENS:
            sure = decoded[:-1]
        piece = self._new(sure)
        if len(sure) == len(decoded):
            self._told = len(self._ids)
            if self._told > 2 * CONTEXT_TOKENS:
                self._ids = self._ids[-CONTEXT_TOKENS:]
                self._told = len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""
        if len(self._ids) == self._told:
            return ""
        piece = self._new(self._text.decode(self._ids))
        self._told = len(self._ids)
        return piece

    def _new(self, decoded: str) -> str:
        piece = decoded[self._shown :]
        self._shown = max(self._shown, len(decoded))
        return piece


class StopStrings:
    """Ends a stream of text before the first stop string, even where that comes in pieces."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be given out, whether a stop string was met). What could be the start of
        a stop string is held back."""
        if not self._stops:
            return text, False
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            safe, self._held = self._held[: min(places)], ""
            return safe, True
        cut = len(self._held) - self._undecided()
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, False

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def load_text(directory: Path) -> Text:
    """The tokenizer and chat template of an engine directory.

    Raises: UserError when tokenizer.json is missing or damaged.
    """
    directory = Path(directory)
    path = directory / TOKENIZER
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            f"tokenizers cannot be imported ({error}); needs it for text; "
            "install it with: pip install tokenizers"
        ) from None
    if not path.is_file():
        raise UserError(f"{path} is missing; needs the model's tokenizer; {REMEDY}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); needs a tokenizer; {REMEDY}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{config_path} holds no settings; needs a JSON object; {REMEDY}")
    return Text(tokenizer, config, _template_source(directory, config))


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the (default) template inside tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several templates, each with a name
        named = {item.get("name"): item.get("template") for item in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … by name, as templates expect them."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
