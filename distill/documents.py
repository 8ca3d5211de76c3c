"""Reading text into documents: .txt, .jsonl and hub data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.artifact import UserError

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_CHARACTERS = 2000
CHARACTERS_PER_TOKEN = 4
_TOP_HEADING = re.compile(r"(?:\A(?:[ \t]*\n)?|\n[ \t]*\n) ?(?== [^=\n]+ = ?\n[ \t]*\n)")
_SPACED = (
    (re.compile(r" ?<unk>"), ""),
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:?!%)\]])(?=\s|$)"), r"\1"),
    (re.compile(r"([(\[$]) (?=\S)"), r"\1"),
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m))\b"), r"\1"),
    (re.compile(r"(?<=s) '(?=\s)"), "'"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" +$", re.MULTILINE), ""),
    (re.compile(r"^ +", re.MULTILINE), ""),
)


def load_documents(specs: Sequence[str], *, max_tokens: int | None = None) -> list[str]:
    """Documents of all specs, in order, without blank ones.

    A spec is a `.txt` or `.jsonl` path or `hub:NAME[:CONFIG][:SPLIT][:FIELD]` (streamed, split
    "train" and field "text" by default). `max_tokens` stops a hub stream after about as many
    tokens (4 characters each). Raises UserError naming the file, and the line where there is one.
    """
    documents: list[str] = []
    for spec in specs:
        found = [text for text in _documents_of(spec, max_tokens) if text.strip()]
        if not found:
            raise UserError(
                f"{spec} holds no text; at least one non-blank document is needed; check that file"
            )
        documents += found
    return documents


def _documents_of(spec: str, max_tokens: int | None) -> Iterable[str]:
    if spec.startswith("hub:"):
        return _hub_documents(spec, max_tokens)
    path = Path(spec).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"{spec!r} is no known kind of text; allowed: a .txt or .jsonl file, or "
            "hub:NAME[:CONFIG][:SPLIT][:FIELD]; rename it or name another"
        )
    text = _read_text(path)
    return _jsonl_documents(path, text) if path.suffix == ".jsonl" else split_text(text)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); "
            "an existing text file is needed; check the path"
        ) from None
    if b"\0" in raw:
        raise UserError(f"{path} is binary; UTF-8 text is needed; name another")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte {error.start}: 0x{raw[error.start]:02x}); "
            "UTF-8 text is needed; convert it, for example with iconv"
        ) from None


def _jsonl_documents(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}); "
                'each line must be an object like {"text": "..."}; mend or remove the line'
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(
                f'{path} line {number} has no string under "text" but is {line.strip()[:60]!r}; '
                'each line must be an object like {"text": "..."}; mend or remove the line'
            )
        yield _whole_characters(row["text"], f"{path} line {number}")


def _whole_characters(text: str, place: str) -> str:
    """The text, which JSON may have given half of a surrogate pair that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half a character ({text[error.start]!a}); needs whole ones; "
            "mend or remove it"
        ) from None
    return text


def split_text(text: str) -> list[str]:
    """Documents of a plain text file.

    Split at lines that are `<|endoftext|>`; else at WikiText's top-level headings (` = Title = `,
    and then detokenised); else paragraphs, between blank lines (or, without any, lines), are
    grouped until a document has 2,000 characters.
    """
    if re.search(rf"^{re.escape(END_OF_TEXT)}\s*$", text, re.MULTILINE):
        parts = re.split(rf"^{re.escape(END_OF_TEXT)}\s*$", text, flags=re.MULTILINE)
    elif len(cuts := [match.end() for match in _TOP_HEADING.finditer(text)]) > 1:
        edges = [0, *cuts, len(text)]
        parts = [detokenise_wikitext(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    else:
        paragraphs = re.split(r"\n(?:[ \t]*\n)+", text)
        joint = "\n\n" if len(paragraphs) > 1 else "\n"
        parts = _grouped(paragraphs if len(paragraphs) > 1 else text.split("\n"), joint)
    return [part.strip() for part in parts if part.strip()]


def _grouped(paragraphs: Sequence[str], joint: str) -> list[str]:
    """Whole paragraphs, as many to a document as it takes to reach DOCUMENT_CHARACTERS."""
    documents: list[str] = []
    group: list[str] = []
    for paragraph in paragraphs:
        group.append(paragraph)
        if sum(map(len, group)) >= DOCUMENT_CHARACTERS:
            documents.append(joint.join(group))
            group = []
    return [*documents, joint.join(group)]


def detokenise_wikitext(text: str) -> str:
    """Undo WikiText's spacing (` , `, ` @-@ `, ` 's`) and drop `<unk>`; other text is unchanged."""
    if " @" not in text and "<unk>" not in text and " , " not in text:
        return text
    for pattern, replacement in _SPACED:
        text = pattern.sub(replacement, text)
    return text


def _hub_documents(spec: str, max_tokens: int | None) -> Iterator[str]:
    fields = spec.removeprefix("hub:").split(":")
    name, config, split, field = (fields + ["", "", "", ""])[:4]
    if not name or len(fields) > 4:
        raise UserError(
            f"{spec!r} is no hub data set; the form is hub:NAME[:CONFIG][:SPLIT][:FIELD]; "
            "for example hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
        )
    remaining = float("inf") if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN
    for row in _hub_rows(spec, name, config or None, split or "train"):
        text = row.get(field or "text")
        if not isinstance(text, str):
            raise UserError(
                f"{spec} has no text field {field or 'text'!r}; it has {', '.join(row)}; "
                "name one of them as the fourth part of the spec"
            )
        yield _whole_characters(text, spec)
        remaining -= len(text)
        if remaining <= 0:
            return


def _hub_rows(spec: str, name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{spec} cannot be read ({reason}); an accessible hub data set is needed; "
            "check its name, configuration and split, and the network"
        ) from error
