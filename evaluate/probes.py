"""Function-style in-context-learning probes: few-shot accuracy on plain facts.

    result = score_tasks(model, tokenizer, load_tasks(), shots=10)
    result.mean_hits_at_1, result.interval95, result.tasks["antonym"].hits_at_1

`model` is a transformers model or any runner (`evaluate.runners`). Each task's queries share
a few fixed shot prefixes. A prefix runs through the model once; its key/value cache is expanded
over the queries behind it, which are padded on the right, where causal attention cannot see the
padding.

Dimensions: B questions of a batch, T tokens after the prefix, K positions with logits, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.artifact import UserError
from evaluate.probe_result import ProbeResult, TaskScore
from evaluate.probe_tasks import TEMPLATE, Pair, Question, few_shot_questions, load_tasks
from evaluate.runners import Runner, prefill
from evaluate.torch_runner import as_runner

__all__ = ["Pair", "ProbeResult", "TaskScore", "load_tasks", "score_questions", "score_tasks"]


@dataclass(frozen=True)
class Prediction:
    """What the model says to one question.

    `top3` are the most likely first answer tokens; `whole` are the most likely tokens at every
    position of the expected answer and one after it, or the first alone.
    """

    top3: tuple[int, ...]
    whole: tuple[int, ...]


def score_tasks(
    model: PreTrainedModel | Runner,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Pair]],
    *,
    shots: int = 10,
    queries_per_task: int = 60,
    prefixes: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    exact_match: bool = False,
    permute_labels: bool = False,
    template: str = TEMPLATE,
    on_task: Callable[[str, TaskScore], None] | None = None,
) -> ProbeResult:
    """Few-shot HITS@1 and HITS@3 of the first answer token over the full vocabulary.

    Args:
        tasks: pairs by task name, as `load_tasks` returns them.
        shots: worked examples before each query, 0 or more.
        prefixes: sets of shots per task among which its queries are split.
        batch_size: queries forwarded at once.
        exact_match: also match the whole answer under greedy decoding (a few tokens more).
        permute_labels: control run with the shots' outputs handed round, so that only the format
            and the labels remain to learn from.
        on_task: called with each finished task, for progress.

    Raises: UserError when a task has too few pairs or a prompt does not fit the model;
        FloatingPointError when the model returns NaN.
    """
    scores: dict[str, TaskScore] = {}
    tokens_forwarded = 0
    with _evaluating(model):
        for name, pairs in tasks.items():
            groups = few_shot_questions(
                tokenizer,
                name,
                pairs,
                shots=shots,
                queries=queries_per_task,
                prefixes=prefixes,
                seed=seed,
                permute_labels=permute_labels,
                template=template,
            )
            predictions: list[Prediction] = []
            for group in groups:
                predicted, tokens = score_questions(model, group, batch_size, exact_match)
                predictions += predicted
                tokens_forwarded += tokens
            questions = [question for group in groups for question in group]
            scores[name] = _task_score(tokenizer, questions, predictions, exact_match)
            if on_task is not None:
                on_task(name, scores[name])
    return ProbeResult(scores, shots, seed, permute_labels, tokens_forwarded)


def score_questions(
    model: PreTrainedModel | Runner,
    questions: Sequence[Question],
    batch_size: int,
    whole: bool = False,
) -> tuple[list[Prediction], int]:
    """Predictions for questions that share their first tokens, and the token positions forwarded.

    The longest common prefix of the token ids runs once, whatever the tokenizer makes of the
    boundary between shots and query.
    """
    runner = as_runner(model)
    _require_context(runner, questions)
    batch_size = min(batch_size, getattr(runner, "max_batch", None) or batch_size)
    shared = min(
        len(commonprefix([question.prompt_ids for question in questions])),
        min(len(question.prompt_ids) for question in questions) - 1,
    )
    cache = _prefix_cache(runner, questions[0].prompt_ids[:shared]) if shared else None
    tokens_forwarded = shared
    predictions: list[Prediction] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        ids_BT = _padded(batch, shared, whole)
        predictions += _predict(runner, batch, ids_BT, shared, cache, whole)
        tokens_forwarded += ids_BT.size
    return predictions, tokens_forwarded


def _prefix_cache(runner: Runner, prefix_ids: Sequence[int]) -> Any:
    return prefill(runner, np.array([prefix_ids], np.int64))[1]


def _predict(
    runner: Runner,
    batch: Sequence[Question],
    ids_BT: np.ndarray,
    shared: int,
    cache: Any,
    whole: bool,
) -> list[Prediction]:
    """One forward pass behind the prefix; the head runs from the first needed position on."""
    rows, width = ids_BT.shape
    spans = [_answer_span(question, shared, whole) for question in batch]
    first = min(span.start for span in spans)
    real_BT = np.arange(width) < np.array([[span.stop] for span in spans])
    logits_BKV = runner.forward(
        ids_BT,
        runner.new_cache(rows) if cache is None else cache.select([0] * rows),
        attention_mask_BT=np.concatenate([np.ones((rows, shared)), real_BT], 1).astype(np.int64),
        position_ids_BS=np.tile(np.arange(shared, shared + width, dtype=np.int64), (rows, 1)),
        logits_to_keep=width - first,
    )
    return [
        _prediction(logits_KV[span.start - first : span.stop - first])
        for logits_KV, span in zip(logits_BKV, spans, strict=True)
    ]


def _prediction(logits_KV: np.ndarray) -> Prediction:
    if np.isnan(logits_KV).any():
        raise FloatingPointError("the model returned NaN logits for a probe")
    top_K3 = torch.from_numpy(logits_KV).topk(3).indices.tolist()
    return Prediction(tuple(top_K3[0]), tuple(top3[0] for top3 in top_K3))


def _answer_span(question: Question, shared: int, whole: bool) -> range:
    """Positions behind the prefix whose next token is asked: the first of the answer, or all."""
    first = len(question.prompt_ids) - shared - 1
    return range(first, first + 1 + (len(question.answer_ids) if whole else 0))


def _padded(batch: Sequence[Question], shared: int, whole: bool) -> np.ndarray:
    """Token ids [B, T] after the prefix, zeros to the right; with their answers when `whole`."""
    rows = [q.prompt_ids[shared:] + (q.answer_ids if whole else ()) for q in batch]
    ids_BT = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = row
    return ids_BT


def _task_score(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    exact_match: bool,
) -> TaskScore:
    expected = [question.answer_ids[0] for question in questions]
    both = list(zip(expected, predictions, strict=True))
    matches = sum(expected.count(prediction.top3[0]) for prediction in predictions)
    return TaskScore(
        hit1=tuple(answer == prediction.top3[0] for answer, prediction in both),
        hit3=tuple(answer in prediction.top3 for answer, prediction in both),
        chance1=matches / len(expected) ** 2,
        exact=tuple(
            _is_exact(tokenizer, question, prediction)
            for question, prediction in zip(questions, predictions, strict=True)
        )
        if exact_match
        else None,
    )


def _is_exact(
    tokenizer: PreTrainedTokenizerBase, question: Question, prediction: Prediction
) -> bool:
    """Greedy decoding gives these answer tokens, then a line break or a special token.

    Feeding the expected answer finds the same verdict as decoding freely: up to the first wrong
    token both see the same text.
    """
    *answer, end = prediction.whole
    ends = end in tokenizer.all_special_ids or str(tokenizer.decode([end])).lstrip(" ")[:1] == "\n"
    return tuple(answer) == question.answer_ids and ends


def _require_context(runner: Runner, questions: Sequence[Question]) -> None:
    longest = max(len(q.prompt_ids) + len(q.answer_ids) for q in questions)
    if longest > runner.max_context:
        raise UserError(
            f"a probe prompt has {longest} tokens; the model takes {runner.max_context}; ask for "
            "fewer shots or leave out the tasks with long inputs"
        )


@contextmanager
def _evaluating(model: PreTrainedModel | Runner) -> Iterator[None]:
    """Evaluation mode without gradients, the former mode restored; nothing for a runner."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
