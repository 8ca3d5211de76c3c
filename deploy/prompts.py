"""Prompts of ``generate``: from the command line, standard input or a batch file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.commit import UserError

Prompt = str | list[dict[str, Any]]  # a plain text, or the messages of a conversation


def read_prompt(words: Sequence[str]) -> str:
    """The words joined; "-" or nothing: standard input, up to its end.

    Raises: UserError when there is no prompt.
    """
    if words and list(words) != ["-"]:
        prompt = " ".join(words)
    elif not words and sys.stdin.isatty():
        raise UserError(
            "no PROMPT was given; needs a text, or - to read standard input; "
            "see python -m deploy generate --help"
        )
    else:
        prompt = _decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if not prompt:
        raise UserError("the prompt is empty; needs one character at least; give some text")
    return prompt


def read_batch(name: str) -> list[Prompt]:
    """Prompts of a .txt file (one a line), or of JSON lines (.jsonl; "-": standard input).

    Blank lines are skipped. Raises: UserError naming the file and line that is wrong.
    """
    if name == "-":
        return _json_prompts(_decoded(sys.stdin.buffer.read(), "standard input"), "standard input")
    path = Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"--batch {name}: needs a .txt file of lines or a .jsonl file of prompts; "
            "rename it, or use - for JSON lines from standard input"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--batch {name}: cannot be read ({error.strerror}); needs a readable file; "
            "name another"
        ) from None
    text = _decoded(content, f"--batch {name}")
    if path.suffix == ".jsonl":
        return _json_prompts(text, name)
    return _some([line for line in text.splitlines() if line.strip()], name)


def _json_prompts(text: str, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompts.append(_json_prompt(line, f"{name}, line {number}"))
    return _some(prompts, name)


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error}); needs one object a line; mend it") from None
    found = value
    if isinstance(value, dict):
        found = value.get("prompt", value.get("messages"))
    if isinstance(found, str) and found:
        return found
    if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
        return found
    raise UserError(
        f'{where}: has no prompt; needs {{"prompt": "some text"}} or {{"messages": [{{…}}]}}; '
        "mend it"
    )


def _some(prompts: Sequence[Prompt], name: str) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{name} holds no prompt; needs one at least; add a line")
    return list(prompts)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {error.start}; needs UTF-8 text; convert it"
        ) from None
