"""A run's tokens: what training, calibration and refit see, and what they must not share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.args import DistilArgs
from distill.artifact import UserError
from distill.teacher import load_teacher
from distill.text import RunText, prepare_text

TextOf = Callable[..., RunText]


@pytest.fixture
def text_of(tiny_dir: Callable[..., Path], tmp_path: Path) -> TextOf:
    """`text_of(refit_tokens=1024)`: 16 training sequences of 128 tokens, from numbered lines."""
    teacher = load_teacher(str(tiny_dir("llama")), dtype=torch.float32)
    lines = [f"Line {number} of the text says {number * 7} and no more." for number in range(400)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))

    def prepare(**changes: object) -> RunText:
        args = DistilArgs(
            data=(str(path),), tokens=2048, seq_len=128, batch_tokens=256,
            **{"refit_tokens": 1024, **changes},  # type: ignore[arg-type]
        )  # fmt: skip
        return prepare_text(args, teacher, tmp_path / "cache")

    return prepare


def rows(ids_NT: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in ids_NT}


def test_refit_sees_sequences_that_training_does_not(text_of: TextOf) -> None:
    text = text_of()
    assert len(text.train) == 16 and len(text.refit) == 8
    assert not rows(text.refit.ids_NT) & rows(text.train.ids_NT)


def test_refit_tokens_leave_the_training_sequences_alone(text_of: TextOf) -> None:
    few, many = text_of(refit_tokens=0), text_of(refit_tokens=2048)
    assert len(few.refit) == 0 and len(many.refit) == 16
    assert np.array_equal(few.train.ids_NT, many.train.ids_NT)
    assert np.array_equal(few.heldout_NT, many.heldout_NT)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_refit_has_the_few_shot_share_of_training(text_of: TextOf, share: float) -> None:
    text = text_of(fewshot_share=share)
    for part in (text.train, text.refit):
        has_answers = part.answer_NT.any(axis=1)
        assert abs(has_answers.mean() - share) <= 0.1
    assert (len(text.train), len(text.refit)) == (16, 8)


def test_calibration_is_the_beginning_of_training(text_of: TextOf) -> None:
    text = text_of(statistics_tokens=512)
    assert np.array_equal(text.calibration.ids_NT, text.train.ids_NT[:4])


def test_baselines_train_and_are_scored_on_the_same(text_of: TextOf) -> None:
    ours, theirs = text_of(), text_of(method="svd")
    assert ours.fingerprint == theirs.fingerprint
    assert ours.fingerprint != text_of(seed=1).fingerprint


def test_little_held_out_text_is_one_short_window_used_once(text_of: TextOf) -> None:
    few, many = text_of(heldout_share=0.002), text_of(heldout_share=0.5)
    assert len(few.heldout_NT) == 1 and few.heldout_NT.shape[1] < 128
    assert many.heldout_NT.shape == (16, 128)
    assert len(rows(many.heldout_NT)) == 16


def test_a_token_without_an_embedding_is_refused(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_dir("llama")), dtype=torch.float32)
    teacher.tokenizer.add_tokens(["<new>"])
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Line one is <new> here."}\n{"text": "Line two is another."}\n' * 20)
    args = DistilArgs(data=(str(path),), tokens=256, seq_len=128, batch_tokens=128)
    with pytest.raises(UserError, match="'<new>', for which .* has no embedding"):
        prepare_text(args, teacher, tmp_path / "cache")
