"""Training text written by the teacher itself.

A row is `seq_len` tokens of documents in sequence: mostly free text after a document separator
and a random opening, sometimes a chat turn. Rows are appended to a .jsonl batch by batch; each
batch has its own seed, so an interrupted run goes on where it stopped and ends with the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.artifact import UserError
from distill.data import document_separator
from distill.fewshot_functions import load_words
from distill.processes import ALONE, Crew
from distill.sampling import sample_batch
from distill.sharding import whole

CHAT_SHARE = 0.2
BARE_SHARE = 0.3
OPENINGS = (
    "{A}", "The {a}", "A {a}", "In the {a}", "{A} and {b}", "How to {a}", "Why {a}", "My {a}",
    "# {A}", "## The {A} of {B}", "{A}:", "{A} is", "What is {a}", "The history of {a}",
    "Once upon a time, a {a}", "In 19", "When the {a}", "Our {a}", "This {a}", "For {a}",
    "There are", "It was", "She", "He said", "They", "We", "I", "1.", "- {A}", "import", "def {a}",
    "Q: ", "Chapter", "Introduction to {a}", "Dear {a}", "According to", "Although", "Scientists",
)  # fmt: skip
REQUESTS = (
    "Tell me about {a}.", "Write a short story about a {a} and a {b}.", "What is {a}?",
    "Explain {a} to a child.", "Give three facts about {a}.", "How does a {a} differ from a {b}?",
    "Write a poem about {a}.", "Make a list of things to do with a {a}.", "Why do people like {a}?",
    "Summarize the history of {a}.", "Use the words {a} and {b} in a sentence.",
    "I need advice about {a}.", "Write a Python function about {a}.", "Describe a {a} in detail.",
    "Write an email about the {a}.", "What should I know before I buy a {a}?",
)  # fmt: skip


class Progress(Protocol):
    """What `write_self_text` reports to."""

    def update(self, advance: int) -> object:
        """`advance` more tokens are done."""


def write_self_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    path: Path,
    *,
    seed: int,
    batch_size: int = 64,
    seq_len: int = 512,
    progress: Progress | None = None,
    crew: Crew = ALONE,
) -> list[str]:
    """Sample at least `tokens` tokens in rows of `seq_len` and return the rows' texts.

    Writes .jsonl lines {"text", "ids", "batch", "settings"}, whole batches fsynced; complete
    batches already in the file are kept, anything after them is dropped and written anew. Raises
    UserError when the file was written by another model or with other settings. Of a crew the
    main process alone writes.
    """
    sizes = _batch_sizes(tokens, batch_size, seq_len)
    settings = _settings(model, [seed, seq_len])
    texts, done = _resume(path, sizes, settings, crew.writes)
    done = crew.from_main(done)
    if progress is not None:
        progress.update(len(texts) * seq_len)
    for index in range(done, len(sizes)):
        ids_BT = sample_batch(
            model,
            _row_prompts(tokenizer, sizes[index], f"{seed}/{index}"),
            seq_len,
            stop_ids=_stop_ids(model, tokenizer),
            seed=int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7], "big"),
            advance=None if progress is None else progress.update,
        )
        rows = [_row(tokenizer, ids, index, settings) for ids in ids_BT.tolist()]
        if crew.writes:
            _append(path, rows)
        texts += [row["text"] for row in rows]
    return texts


def _batch_sizes(tokens: int, batch_size: int, seq_len: int) -> list[int]:
    rows = -(-tokens // seq_len)
    return [min(batch_size, rows - done) for done in range(0, rows, batch_size)]


def _settings(model: PreTrainedModel, values: Sequence[Any]) -> str:
    """Short hash of the sampling settings and of a sample of every weight."""
    digest = hashlib.sha256(json.dumps(values).encode())
    for name, weight in model.state_dict().items():
        few = whole(weight).flatten()[:64].to("cpu", torch.float32)
        digest.update(name.encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    known = (*ends, tokenizer.eos_token_id, document_separator(tokenizer))
    return frozenset(int(token) for token in known if token is not None)


def _row_prompts(tokenizer: PreTrainedTokenizerBase, rows: int, seed: str) -> list[Any]:
    return [
        partial(_opening, tokenizer, random.Random(f"selftext/{seed}/{row}")) for row in range(rows)
    ]


def _opening(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[int]:
    """Separator and the first words of a document: a bare start, an opening or a chat request."""
    first, second = rng.sample(load_words().words, 2)
    names = {"a": first, "b": second, "A": first.capitalize(), "B": second.capitalize()}
    separator = document_separator(tokenizer)
    draw = rng.random()
    if draw < CHAT_SHARE and tokenizer.chat_template:
        turns = [{"role": "user", "content": rng.choice(REQUESTS).format(**names)}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[:1] == [separator] else [separator, *ids]
    if draw < CHAT_SHARE + BARE_SHARE:
        return [separator]
    text = rng.choice(OPENINGS).format(**names)
    return [separator, *tokenizer(text, add_special_tokens=False).input_ids]


def _row(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], batch: int, settings: str
) -> dict[str, Any]:
    """The text leaves out the opening separator (packing puts it back) and a torn letter."""
    body = ids[1:] if ids[0] == document_separator(tokenizer) else ids
    text = tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return {"text": text.rstrip("\ufffd"), "ids": ids, "batch": batch, "settings": settings}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("ab") as stream:
        stream.write(lines.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _resume(path: Path, sizes: Sequence[int], settings: str, writes: bool) -> tuple[list[str], int]:
    """Texts of the complete leading batches and their number; the file is cut after them by the
    process that writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.read_bytes() if path.exists() else b""
    rows: list[dict[str, Any]] = []
    ends = [0]
    for line in raw.splitlines(keepends=True):
        row = _parsed(line)
        if row is None or len(rows) > sum(sizes):
            break
        if row.get("settings") != settings:
            raise UserError(
                f"{path} holds text of another teacher or other sampling settings; "
                "only a file of this very run can be continued; remove it or give another --run"
            )
        rows.append(row)
        ends.append(ends[-1] + len(line))
    done = _complete_batches(rows, sizes)
    kept = sum(sizes[:done])
    if writes and raw[ends[kept] :]:
        with path.open("r+b") as stream:
            stream.truncate(ends[kept])
            os.fsync(stream.fileno())
    return [row["text"] for row in rows[:kept]], done


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The row of a whole line; None for a torn one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "text" in row else None


def _complete_batches(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> int:
    for index, size in enumerate(sizes):
        before = sum(sizes[:index])
        if [row["batch"] for row in rows[before : before + size]] != [index] * size:
            return index
        following = rows[before + size : before + size + 1]
        if following and following[0]["batch"] == index:
            return index
    return len(sizes)
