"""Function-style tasks: files of input/output pairs, and the few-shot questions made of them.

A task file is a JSON list of `{"input": ..., "output": ...}`, the format of the public
function-vector tasks (Todd et al. 2023, arXiv 2310.15213), so any folder of such files works.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from distill.artifact import UserError

BUILTIN_TASKS = Path(__file__).parent / "tasks"
TEMPLATE = "Q: {input}\nA: {output}\n\n"


class Pair(NamedTuple):
    """One fact: the input that is shown and the output that is expected."""

    input: str
    output: str


@dataclass(frozen=True)
class Question:
    """One query behind its shots: token ids of the whole prompt and of the expected answer.

    The answer's first token is never blank: tokenizers that split " 7" into a space and a digit
    have that space counted to the prompt.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


def load_tasks(directory: str | Path | None = None) -> dict[str, list[Pair]]:
    """Every `*.json` of a folder (default: the built-in tasks) by file name without suffix.

    Raises: UserError naming the file and line that is not a list of input/output strings.
    """
    folder = Path(directory) if directory is not None else BUILTIN_TASKS
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"{folder} holds no *.json task files; needs a folder of JSON lists of "
            '{"input": "...", "output": "..."}; point to one or leave it out for the built-in tasks'
        )
    return {path.stem: _load_task(path) for path in paths}


def few_shot_questions(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    pairs: Sequence[Pair],
    *,
    shots: int,
    queries: int,
    prefixes: int,
    seed: int,
    permute_labels: bool = False,
    template: str = TEMPLATE,
) -> list[list[Question]]:
    """Draw up to `queries` pairs and ask them behind `prefixes` fixed sets of shots.

    Depends on the seed, the task's name and its pairs only. A query's input is never among its
    shots; fewer shots are the head of more. `permute_labels` hands each shot the output of
    another, which leaves the format and the set of labels but destroys the function.

    Returns: one list of questions per prefix.
    Raises: UserError when the task has too few pairs.
    """
    generator = random.Random(f"{seed}:{name}")
    asked = generator.sample(list(pairs), min(queries, len(pairs)))
    groups = [group for p in range(prefixes) if (group := asked[p::prefixes])]
    return [
        _tokenise(
            tokenizer, _shots(generator, name, pairs, group, shots), group, template, permute_labels
        )
        for group in groups
    ]


def _shots(
    generator: random.Random, name: str, pairs: Sequence[Pair], group: Sequence[Pair], shots: int
) -> list[Pair]:
    inputs = {pair.input for pair in group}
    allowed = [pair for pair in pairs if pair.input not in inputs]
    generator.shuffle(allowed)
    if len(allowed) < shots:
        raise UserError(
            f"task {name} has {len(pairs)} pairs, {len(allowed)} of them free to be shots; "
            f"{shots} shots need as many; add pairs, or ask for fewer shots or queries"
        )
    return allowed[:shots]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase,
    shots: Sequence[Pair],
    group: Sequence[Pair],
    template: str,
    permute_labels: bool,
) -> list[Question]:
    head, _, rest = template.partition("{input}")
    middle, _, tail = rest.partition("{output}")
    cue = middle.rstrip(" ")
    labels = [pair.output for pair in shots]
    if permute_labels:
        labels = labels[1:] + labels[:1]
    shown = "".join(
        head + pair.input + middle + label + tail for pair, label in zip(shots, labels, strict=True)
    )
    prompts = [shown + head + pair.input + cue for pair in group]
    answered = [
        prompt + middle[len(cue) :] + pair.output
        for prompt, pair in zip(prompts, group, strict=True)
    ]
    return [
        _question(tokenizer, prompt_ids, full_ids)
        for prompt_ids, full_ids in zip(
            tokenizer(prompts)["input_ids"], tokenizer(answered)["input_ids"], strict=True
        )
    ]


def _question(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], full_ids: list[int]
) -> Question:
    """Split the answered text where it leaves the prompt's own tokens."""
    special = set(tokenizer.all_special_ids)
    while full_ids[-1] in special:
        full_ids = full_ids[:-1]
    cut = len(commonprefix([prompt_ids, full_ids]))
    while cut + 1 < len(full_ids) and _is_blank(tokenizer, full_ids[cut]):
        cut += 1
    return Question(tuple(full_ids[:cut]), tuple(full_ids[cut:]))


def _is_blank(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return not str(tokenizer.decode([token_id])).strip()


def _load_task(path: Path) -> list[Pair]:
    try:
        text = path.read_text(encoding="utf-8")
        items = list(_items_with_lines(text))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{line} is not valid UTF-8 JSON ({error}); needs a JSON list of "
            '{"input": "...", "output": "..."}; correct the file'
        ) from error
    pairs = []
    for line_number, item in items:
        values = [item.get(key) if isinstance(item, dict) else None for key in ("input", "output")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise UserError(
                f"{path} line {line_number} has {json.dumps(item, ensure_ascii=False)[:80]}; needs "
                '{"input": "...", "output": "..."} with two non-empty strings; correct that line'
            )
        pairs.append(Pair(*(str(value).strip() for value in values)))
    if not pairs:
        raise UserError(f"{path} is an empty list; needs input/output pairs; add some")
    return pairs


def _items_with_lines(text: str) -> Iterator[tuple[int, object]]:
    """(line number, item) of a JSON list; any other document is one item that is not a pair."""
    document = json.loads(text)
    if not isinstance(document, list):
        yield 1, [document]
        return
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    for _ in document:
        while text[position] in " \t\r\n,":
            position += 1
        item, end = decoder.raw_decode(text, position)
        yield text.count("\n", 0, position) + 1, item
        position = end
