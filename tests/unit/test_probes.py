"""Probe tasks are true and well formed; scoring equals asking one question at a time."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.artifact import UserError
from evaluate import probes
from evaluate.probe_result import bootstrap_interval95
from evaluate.probe_tasks import BUILTIN_TASKS, Pair, Question, few_shot_questions
from evaluate.probes import load_tasks, score_questions, score_tasks
from evaluate.torch_runner import TorchCache

TASKS = load_tasks()
LETTERS = [Pair(f"{a}{b}", f"{b}{a}") for a, b in itertools.combinations("abcdefghijkl", 2)]
DRAW: dict[str, Any] = {"shots": 5, "queries": 24, "prefixes": 4, "seed": 0}


def test_builtin_tasks_are_many_large_and_without_duplicates() -> None:
    assert len(TASKS) >= 14
    for name, pairs in TASKS.items():
        repeated = [word for word, count in Counter(p.input for p in pairs).items() if count > 1]
        assert len(pairs) >= 60, name
        assert not repeated, (name, repeated)
        assert all(p.input != p.output and p == (p.input.strip(), p.output.strip()) for p in pairs)
        lines = (BUILTIN_TASKS / f"{name}.json").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(pairs) + 2, f"{name}: one pair per line"


def split_three(text: str) -> list[str]:
    words = text.split(", ")
    assert len(set(words)) == 3, text
    return words


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("capitalise", str.capitalize),
        ("first-letter", lambda text: text[0]),
        ("last-letter", lambda text: text[-1]),
        ("choose-first-of-three", lambda text: split_three(text)[0]),
        ("alphabetically-first", lambda text: min(split_three(text))),
    ],
)
def test_builtin_answers_of_computable_tasks(name: str, rule: Callable[[str], str]) -> None:
    assert [p for p in TASKS[name] if rule(p.input) != p.output] == []


def test_builtin_animals_are_the_only_animal_of_their_three() -> None:
    animals = {p.output for p in TASKS["choose-animal"]}
    for p in TASKS["choose-animal"]:
        assert [word for word in split_three(p.input) if word in animals] == [p.output]
    places = Counter(split_three(p.input).index(p.output) for p in TASKS["choose-animal"])
    assert min(places.values()) >= 20, "the place must not give the answer away"


def test_previous_item_is_the_inverse_of_next_item() -> None:
    after = dict(TASKS["next-item"])
    both = [p for p in TASKS["previous-item"] if p.output in after]
    assert len(both) > 60
    assert [p for p in both if after[p.output] != p.input] == []


def test_no_query_is_among_its_own_shots_and_fewer_shots_are_the_head_of_more(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def prompts(**changed: Any) -> list[list[list[str]]]:
        """Per group and question, the "x\\nA: y" blocks of its prompt; the last lacks its y."""
        groups = few_shot_questions(tiny_tokenizer, "pairs", LETTERS, **{**DRAW, **changed})
        texts = [[tiny_tokenizer.decode(q.prompt_ids) for q in group] for group in groups]
        return [[[b.strip() for b in t.split("Q: ")[1:]] for t in group] for group in texts]

    five, one = prompts(), prompts(shots=1)
    assert [len(group) for group in five] == [6, 6, 6, 6]
    for group, small in zip(five, one, strict=True):
        assert all(blocks[:5] == group[0][:5] for blocks in group), "one set of shots per group"
        shots = [Pair(*block.split("\nA: ")) for block in group[0][:5]]
        assert len(set(shots)) == 5 and set(shots) <= set(LETTERS)
        queries = {blocks[5].removesuffix("\nA:") for blocks in group}
        assert not queries & {shot.input for shot in shots}
        assert [blocks[:1] + blocks[5:] for blocks in group] == small
    assert len({blocks[5] for group in five for blocks in group}) == 24
    assert prompts() == five and prompts(seed=1) != five
    assert {len(blocks) for group in prompts(shots=0) for blocks in group} == {1}


def test_expected_token_is_the_first_of_the_answer_in_context(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pairs = [Pair("hot", "cold"), Pair("big", "small"), Pair("three", "12"), Pair("a", "ab c")]
    (group,) = few_shot_questions(
        tiny_tokenizer, "t", pairs, shots=0, queries=4, prefixes=1, seed=0
    )
    for question in group:
        prompt = tiny_tokenizer.decode(question.prompt_ids)
        answer = tiny_tokenizer.decode(question.answer_ids)
        pair = next(p for p in pairs if prompt.startswith(f"Q: {p.input}\n"))
        assert prompt + answer == f"Q: {pair.input}\nA: {pair.output}"
        assert tiny_tokenizer.decode(question.answer_ids[:1]).strip(), "a blank is not an answer"
        assert prompt.endswith("A: ") == (pair.output == "12"), "only digits have a token of blank"


def naive(model: PreTrainedModel, question: Question, whole: bool) -> probes.Prediction:
    """One prompt at a time, no cache, no padding, all logits; greedy by decoding freely."""
    ids = list(question.prompt_ids)
    with torch.no_grad():
        top3 = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(3).indices.tolist()
        ids += question.answer_ids if whole else ()
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, len(question.prompt_ids) - 1 :]
    return probes.Prediction(tuple(top3), tuple(logits_TV.argmax(-1).tolist()))


def disagreements(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, whole: bool = False
) -> int:
    """Questions whose batched prediction differs from the naive one, over two tasks."""
    wrong, seen = 0, set()
    for name in ("antonym", "choose-animal"):
        for group in few_shot_questions(tokenizer, name, TASKS[name], **DRAW):
            with torch.no_grad():
                predicted, _ = score_questions(model, group, 4, whole)
            expected = [naive(model, question, whole) for question in group]
            wrong += sum(a != b for a, b in zip(predicted, expected, strict=True))
            seen |= {prediction.top3 for prediction in expected}
    assert len(seen) > 24, "predictions that hardly vary could not show a mistake"
    return wrong


@pytest.mark.parametrize("whole", [False, True])
def test_batched_scoring_equals_one_prompt_at_a_time(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    family: str,
    whole: bool,
) -> None:
    assert disagreements(tiny_model(family), tiny_tokenizer, whole) == 0


def uncopied(cache: TorchCache, rows: Any) -> TorchCache:
    cache.values.batch_select_indices(torch.tensor(list(rows)))
    return cache


def left_padded(batch: Any, shared: int, whole: bool) -> np.ndarray:
    rows = [torch.tensor(q.prompt_ids[shared:]) for q in batch]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").numpy()


@pytest.mark.parametrize("fault", ["cache not copied", "padding left", "cache lost", "span late"])
def test_the_comparison_notices_broken_scoring(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    span = probes._answer_span
    if fault == "cache not copied":
        monkeypatch.setattr(TorchCache, "select", uncopied)
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            assert disagreements(tiny_model("llama"), tiny_tokenizer) == 0
        return
    if fault == "padding left":
        monkeypatch.setattr(probes, "_padded", left_padded)
    elif fault == "cache lost":
        monkeypatch.setattr(probes, "_prefix_cache", lambda model, ids: None)
        original = probes._predict
        monkeypatch.setattr(
            probes,
            "_predict",
            lambda model, batch, ids, shared, cache, whole: original(
                model, [_behind(q, shared) for q in batch], ids, 0, None, whole
            ),
        )
    else:
        monkeypatch.setattr(
            probes,
            "_answer_span",
            lambda q, s, w: range(max(span(q, s, w).start - 1, 0), span(q, s, w).stop),
        )
    assert disagreements(tiny_model("llama"), tiny_tokenizer) > 10


def _behind(question: Question, shared: int) -> Question:
    return Question(question.prompt_ids[shared:], question.answer_ids)


class Reader:
    """A runner with known answers: reads all text so far and asks `say` how it goes on, best first.

    Its cache is the text itself.
    """

    max_context = 4096

    def __init__(self, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], list[str]]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.vocabulary = len(tokenizer)
        self.prompts: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def new_cache(self, batch: int) -> ReaderCache:
        return ReaderCache(np.zeros((batch, 0), np.int64))

    def forward(
        self, input_ids_BS: np.ndarray, cache: ReaderCache, *, logits_to_keep: int, **_: Any
    ) -> np.ndarray:
        cache.ids_BT = np.concatenate([cache.ids_BT, input_ids_BS], axis=1)
        rows, total = cache.ids_BT.shape
        logits_BKV = np.zeros((rows, logits_to_keep, self.vocabulary), np.float32)
        for row, column in itertools.product(range(rows), range(logits_to_keep)):
            length = total - logits_to_keep + column + 1
            text = self.tokenizer.decode(cache.ids_BT[row, :length])
            self.prompts.append(text)
            for score, said in enumerate(reversed(self.say(text)), 1):
                ids = self.tokenizer(text + said)["input_ids"]
                logits_BKV[row, column, ids[length] if length < len(ids) else 0] = score
        return logits_BKV


class ReaderCache:
    def __init__(self, ids_BT: np.ndarray) -> None:
        self.ids_BT = ids_BT

    @property
    def length(self) -> int:
        return self.ids_BT.shape[1]

    def select(self, rows: Any) -> ReaderCache:
        return ReaderCache(self.ids_BT[list(rows)])


def continued(text: str, answer: str) -> str:
    """The rest of `answer` after a text that ends with "A:" or, further on, with part of it."""
    written = text.rpartition("\nA:")[2]
    return f" {answer}"[len(written) :] if f" {answer}".startswith(written) else ""


def test_known_answers_give_exactly_known_scores(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    order = {pair.input: i for i, pair in enumerate(LETTERS)}

    def say(text: str) -> list[str]:
        """Of every four: right; right but second; right but fourth; right, then no line break."""
        query = text.rpartition("Q: ")[2].partition("\nA:")[0]
        index = order.get(query, 0)
        end = "?" if index % 4 == 3 else "\n\n"
        rest = continued(text, LETTERS[index].output + end)
        return [[rest], ["!", rest], ["!", "?", ";", rest], [rest]][index % 4]

    model = Reader(tiny_tokenizer, say)
    result = score_tasks(
        model, tiny_tokenizer, {"t": LETTERS}, shots=2, prefixes=4, exact_match=True, batch_size=5,
        queries_per_task=len(LETTERS),
    )  # fmt: skip
    score = result.tasks["t"]
    kinds = Counter(i % 4 for i in range(len(LETTERS)))
    total = len(LETTERS)
    assert len(score.hit1) == total
    assert score.hits_at_1 == result.mean_hits_at_1 == (kinds[0] + kinds[3]) / total
    assert score.hits_at_3 == (kinds[0] + kinds[1] + kinds[3]) / total
    assert score.exact_match == kinds[0] / total
    assert json.loads(json.dumps(result.to_json()))["tasks"]["t"]["queries"] == total


def test_tokens_forwarded_are_those_the_model_saw(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    seen = 0

    class Counting(Reader):
        def forward(self, input_ids_BS: np.ndarray, *rest: Any, **others: Any) -> np.ndarray:
            nonlocal seen
            seen += input_ids_BS.size
            return super().forward(input_ids_BS, *rest, **others)

    result = score_tasks(
        Counting(tiny_tokenizer, lambda text: []), tiny_tokenizer, {"t": LETTERS}, shots=10,
        queries_per_task=24,
    )  # fmt: skip
    naive_tokens = sum(
        len(q.prompt_ids)
        for group in few_shot_questions(tiny_tokenizer, "t", LETTERS, **{**DRAW, "shots": 10})
        for q in group
    )
    assert 0 < result.tokens_forwarded == seen < naive_tokens / 3


def learner(text: str) -> list[str]:
    """Swaps the letters only when every shot does; otherwise repeats the last label."""
    *shots, last = text.split("Q: ")[1:]
    examples = [shot.strip().split("\nA: ") for shot in shots]
    swaps = all(given == label[::-1] for given, label in examples)
    return [continued(text, last.partition("\n")[0][::-1] if swaps else examples[-1][1])]


def test_permuted_labels_bring_a_learner_to_chance(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = Reader(tiny_tokenizer, learner)
    plain = score_tasks(model, tiny_tokenizer, {"t": LETTERS}, shots=5)
    control = score_tasks(model, tiny_tokenizer, {"t": LETTERS}, shots=5, permute_labels=True)
    assert plain.mean_hits_at_1 == 1 and control.permuted_labels
    assert plain.mean_chance1 < 0.3
    assert abs(control.mean_hits_at_1 - control.mean_chance1) < 0.15
    shown = model.prompts[-1]
    labels = [shot.strip().split("\nA: ") for shot in shown.split("Q: ")[1:-1]]
    assert sorted(label[::-1] for _, label in labels) == sorted(given for given, _ in labels)
    assert all(given != label[::-1] for given, label in labels)


def test_chance_is_the_mean_over_all_permutations_of_the_answers() -> None:
    expected, predicted = [5, 5, 7, 9], [5, 7, 7, 1]
    questions = [Question((1,), (token,)) for token in expected]
    predictions = [probes.Prediction((token, 90, 91), (token,)) for token in predicted]
    score = probes._task_score(None, questions, predictions, False)
    every = [
        np.mean([a == b for a, b in zip(answers, predicted, strict=True)])
        for answers in itertools.permutations(expected)
    ]
    assert score.chance1 == pytest.approx(np.mean(every), abs=1e-12)
    assert score.hit1 == (True, False, True, False)


def test_bootstrap_interval_equals_resampling_the_queries() -> None:
    hits = [[True] * 45 + [False] * 15, [True] * 5 + [False] * 35]
    generator = np.random.default_rng(1)
    means = [
        np.mean([generator.choice(task, len(task)).mean() for task in hits]) for _ in range(4000)
    ]
    low, high = bootstrap_interval95(hits)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.013)
    narrow = bootstrap_interval95([task * 16 for task in hits])
    assert (narrow[1] - narrow[0]) == pytest.approx((high - low) / 4, rel=0.15)
    assert bootstrap_interval95(hits) == (low, high)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n {"input": "a", "output": "b"},\n {"input": "c"}\n]', "line 3"),
        ('[\n {"input": "a", "output": "b"},\n\n {"input": "c", "output": 3}\n]', "line 4"),
        ('[\n {"input": "a", "output": " "}]', "line 2"),
        ('[\n {"input": "a", "output": "b"}\n {"input": "c", "output": "d"}\n]', "line 3"),
        ('{"input": "a", "output": "b"}', "line 1"),
        ("[]", "empty list"),
        ("", "line 1"),
    ],
)
def test_a_bad_task_file_is_named_with_its_line(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "mine.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tasks(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "mine.json") in message and line in message and "\n" not in message


def test_folders_without_tasks_and_binary_files_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="holds no"):
            load_tasks(folder)
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(UserError, match="UTF-8"):
        load_tasks(tmp_path)


def test_any_folder_of_pairs_works(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('[{"input": "a ", "output": "b", "note": 1}]')
    assert load_tasks(tmp_path) == {"mine": [Pair("a", "b")]}


def test_too_few_pairs_and_too_long_prompts_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    with pytest.raises(UserError, match="few has 8 pairs, 6 of them free"):
        score_tasks(model, tiny_tokenizer, {"few": LETTERS[:8]}, shots=10)
    with pytest.raises(UserError, match="the model takes 64"):
        score_tasks(model, tiny_tokenizer, {"t": LETTERS}, shots=10)


def test_a_model_in_training_comes_back_in_training(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama").train()
    score_tasks(model, tiny_tokenizer, {"t": LETTERS}, shots=1, queries_per_task=8)
    assert model.training


def test_nan_logits_are_an_error_not_a_score(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        score_tasks(model, tiny_tokenizer, {"t": LETTERS}, shots=1)
