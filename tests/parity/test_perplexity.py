"""Perplexity, bits per byte and KL equal an independent computation, token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deploy.runner import open_runner
from distill.student_format import load_student
from distill.teacher import load_teacher
from evaluate import perplexity
from evaluate.perplexity import TeacherReference, Window, make_windows, score_windows
from evaluate.probe_result import ProbeResult
from evaluate.probe_tasks import Pair
from evaluate.probes import score_tasks
from evaluate.runners import greedy_step, prefill
from evaluate.torch_runner import TorchRunner
from tests.evaluate_runs import all_ranks, export_run, write_run

NATS_TOLERANCE = 1e-5
ENGINE_NATS_TOLERANCE = 1e-4
TEXT = "Every morning a boy walks along the bank, counting boats. Q: hot\nA: cold\n\nNaïve café 3. "


@pytest.fixture
def stream(tiny_tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return np.array(tiny_tokenizer(TEXT * 3, add_special_tokens=False).input_ids)


def windows_of(tokenizer: Any, stream: np.ndarray, **changed: Any) -> list[Window]:
    settings: dict[str, Any] = {"window": 40, "stride": 16, "limit": 999, "prefix": (1,)}
    return make_windows(tokenizer, stream, **{**settings, **changed})


def independent(
    student: PreTrainedModel, teacher: PreTrainedModel, stream: np.ndarray, window: int, stride: int
) -> tuple[float, float, int]:
    """Mean nats and KL, one forward pass for every single token, in float64, by the definition:
    a token's context goes back to the start of the first window that holds it."""
    nll, kl, count = 0.0, 0.0, 0
    body = window - 1
    for at in range(len(stream)):
        start = 0
        while start + body <= at:
            start += stride
        context = torch.tensor([[1, *stream[start:at]]])
        with torch.no_grad():
            q, p = (m.double()(context).logits[0, -1].log_softmax(-1) for m in (student, teacher))
        nll -= q[stream[at]].item()
        kl += (p.exp() * (p - q)).sum().item()
        count += 1
    return nll / count, kl / count, count


def test_equals_the_definition_token_by_token(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
    family: str,
) -> None:
    student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
    windows = windows_of(tiny_tokenizer, stream)
    scores = score_windows(TorchRunner(student), windows, TeacherReference(teacher, windows))
    nll, kl, count = independent(student, teacher, stream, 40, 16)
    assert scores.tokens_N.sum() == count == len(stream)
    assert scores.nll_N.sum() / count == pytest.approx(nll, abs=NATS_TOLERANCE)
    assert scores.kl_N.sum() / count == pytest.approx(kl, abs=NATS_TOLERANCE)
    figures = scores.to_json()
    low, high = figures["perplexity_interval95"]
    assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert low < figures["perplexity"] < high


@pytest.mark.parametrize("fault", ["targets shifted", "context lost", "models swapped"])
def test_the_comparison_notices_a_broken_score(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    windows = windows_of(tiny_tokenizer, stream)
    if fault == "context lost":
        windows = windows_of(tiny_tokenizer, stream, window=18)
    elif fault == "targets shifted":
        monkeypatch.setattr(perplexity, "prefill", shifted_prefill)
    models = (teacher, student) if "swapped" in fault else (student, teacher)
    scores = score_windows(TorchRunner(models[0]), windows, TeacherReference(models[1], windows))
    nll, kl, count = independent(student, teacher, stream, 40, 16)
    wrong = abs(scores.nll_N.sum() / count - nll) + abs(scores.kl_N.sum() / count - kl)
    assert wrong > 100 * NATS_TOLERANCE


def shifted_prefill(runner: Any, ids: np.ndarray, keep: int) -> Any:
    logits, cache = prefill(runner, ids, keep)
    return np.roll(logits, -1, axis=1), cache


def test_bits_per_byte_counts_the_text_that_is_scored(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
) -> None:
    model = tiny_model("llama")
    windows = windows_of(tiny_tokenizer, stream, window=len(stream) + 1, stride=len(stream))
    scores = score_windows(TorchRunner(model), windows, TeacherReference(model, windows))
    figures = scores.to_json()
    size = len((TEXT * 3).encode())
    assert figures["bytes"] == size and figures["windows"] == 1
    assert figures["bits_per_byte"] == pytest.approx(scores.nll_N.sum() / math.log(2) / size)
    assert abs(figures["kl_nats_per_token"]) < NATS_TOLERANCE and figures["same_first_choice"] == 1


def test_every_token_is_scored_once_whatever_the_stride(
    tiny_tokenizer: PreTrainedTokenizerFast, stream: np.ndarray
) -> None:
    for window, stride in ((40, 39), (40, 16), (40, 1), (500, 3)):
        windows = windows_of(tiny_tokenizer, stream, window=window, stride=stride)
        scored = np.concatenate([w.ids_T[w.first :] for w in windows])
        assert (scored == stream).all(), (window, stride)
        assert all(w.ids_T[0] == 1 and len(w.ids_T) <= window for w in windows)
    assert len(windows_of(tiny_tokenizer, stream, limit=2)) == 2
    with pytest.raises(ValueError, match="stride"):
        windows_of(tiny_tokenizer, stream, stride=40)


def test_nan_logits_are_an_error_not_a_score(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    windows = windows_of(tiny_tokenizer, stream)
    with pytest.raises(FloatingPointError):
        score_windows(TorchRunner(model), windows, TeacherReference(teacher, windows))


def test_prefill_and_steps_equal_one_pass(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    runner = TorchRunner(tiny_model(family))
    ids = np.arange(20, 50)[None].repeat(2, axis=0)
    all_logits, _ = prefill(runner, ids, keep=30)
    _, cache = prefill(runner, ids[:, :29])
    assert cache.length == 29 and cache.select([1, 0, 0]).length == 29
    assert (greedy_step(runner, ids[:, 29:], cache) == all_logits[:, -1:].argmax(-1)).all()
    assert cache.length == 30


TASK = [Pair(f"{a}{b}", f"{b}{a}") for a, b in itertools.combinations("abcdefgh", 2)]


def scores_of(
    runner: Any, teacher: PreTrainedModel, tokenizer: Any, windows: list[Window]
) -> tuple[float, float, ProbeResult]:
    """Mean nats, mean KL and probes of one contender."""
    scores = score_windows(runner, windows, TeacherReference(teacher, windows))
    probes = score_tasks(
        runner, tokenizer, {"swap": TASK}, shots=3, queries_per_task=20, exact_match=True
    )
    count = scores.tokens_N.sum()
    return scores.nll_N.sum() / count, scores.kl_N.sum() / count, probes


def test_pytorch_and_onnx_give_the_same_perplexity_and_probes(
    tiny_dir: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stream: np.ndarray,
    tmp_path: Path,
    family: str,
) -> None:
    teacher_dir = tiny_dir(family)
    run = write_run(tmp_path / "half", teacher_dir, ranks=all_ranks(teacher_dir, 16))
    other = write_run(tmp_path / "other", teacher_dir, ranks=all_ranks(teacher_dir, 12))
    teacher = load_teacher(str(teacher_dir), dtype=torch.float32).model
    windows = windows_of(tiny_tokenizer, stream)
    plain = TorchRunner(load_student(run / "student", torch.float32))
    nll, kl, probes = scores_of(plain, teacher, tiny_tokenizer, windows)
    engine = open_runner(export_run(run), provider="cpu", threads=1)
    engine_nll, engine_kl, engine_probes = scores_of(engine, teacher, tiny_tokenizer, windows)
    assert engine_nll == pytest.approx(nll, abs=ENGINE_NATS_TOLERANCE)
    assert engine_kl == pytest.approx(kl, abs=ENGINE_NATS_TOLERANCE)
    assert engine_probes.tasks == probes.tasks
    wrong = open_runner(export_run(other), provider="cpu", threads=1)
    wrong_nll, wrong_kl, _ = scores_of(wrong, teacher, tiny_tokenizer, windows)
    assert abs(wrong_nll - nll) + abs(wrong_kl - kl) > 50 * ENGINE_NATS_TOLERANCE
