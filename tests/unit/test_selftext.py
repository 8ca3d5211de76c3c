"""Sampling with preallocated caches, and self text that survives interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.artifact import UserError
from distill.data import document_separator, load_documents
from distill.sampling import pick, sample_batch
from distill.selftext import write_self_text

SEQ_LEN = 40
OPENINGS = ([0, 70, 71], [0], [0, 80, 81, 82, 83])


def fixed_prompts():
    return [lambda ids=ids: list(ids) for ids in OPENINGS]


def replayed(model, seed: int, stop_ids=frozenset()) -> torch.Tensor:
    """The same draws by full forward passes without any cache."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[0] for _ in OPENINGS]
    forced = [list(ids[1:]) for ids in OPENINGS]
    for _ in range(1, SEQ_LEN):
        with torch.no_grad():
            logits_BV = model(torch.tensor(rows), use_cache=False).logits[:, -1]
        draws = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        for n, token in enumerate(pick(logits_BV, draws).tolist()):
            if forced[n]:
                token = forced[n].pop(0)
            elif token in stop_ids:
                forced[n] = list(OPENINGS[n])
            rows[n].append(token)
    return torch.tensor(rows)


def test_cached_sampling_equals_sampling_without_cache(family, tiny_model) -> None:
    """Longer than the sliding windows, so a wrong mask or a wrong position shows."""
    model = tiny_model(family)
    sampled = sample_batch(model, fixed_prompts(), SEQ_LEN, stop_ids=frozenset(), seed=11)
    assert torch.equal(sampled, replayed(model, 11))
    assert not torch.equal(sampled, replayed(model, 12))
    assert not torch.equal(sampled, replayed(tiny_model(family, seed=1), 11))


def test_stopping_rows_open_a_new_document(tiny_model) -> None:
    stops = frozenset(range(100, 160))
    model = tiny_model("llama")
    sampled = sample_batch(model, fixed_prompts(), SEQ_LEN, stop_ids=stops, seed=3)
    assert torch.equal(sampled, replayed(model, 3, stops))
    places = [t for t in range(5, SEQ_LEN - 5) if sampled[2, t].item() in stops]
    assert places
    assert sampled[2, places[0] + 1 : places[0] + 6].tolist() == OPENINGS[2]


def test_pick_follows_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits = probs.log().expand(4000, 4)
    share = torch.bincount(pick(logits, draws), minlength=4) / 4000
    assert torch.allclose(share, probs, atol=2e-3)


def test_pick_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    draws = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert pick(logits, draws).tolist() == [1, 2]


class Counter:
    """Adds up what it is told; raises at the given total."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.total = 0
        self.stop_at = stop_at

    def update(self, advance: int) -> None:
        self.total += advance
        if self.stop_at is not None and self.total > self.stop_at:
            raise KeyboardInterrupt


def read_ids(path: Path) -> np.ndarray:
    """ids_NT of every row, exactly as sampled."""
    return np.array([json.loads(row)["ids"] for row in path.read_text().splitlines()])


def write(model, tokenizer, path: Path, **changes) -> list[str]:
    options = {"seed": 0, "batch_size": 3, "seq_len": 24, "tokens": 24 * 8, **changes}
    tokens = options.pop("tokens")
    return write_self_text(model, tokenizer, tokens, path, **options)


def test_self_text_is_whole_rows_and_loads_as_documents(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    path, counter = tmp_path / "deep" / "self.jsonl", Counter()
    texts = write(tiny_model("llama"), tiny_tokenizer, path, progress=counter)
    ids_NT = read_ids(path)
    assert ids_NT.shape == (8, 24) and counter.total == 24 * 8
    assert (ids_NT[:, 0] == document_separator(tiny_tokenizer)).all()
    assert len({tuple(row) for row in ids_NT}) == 8
    assert len(texts) == 8 and load_documents([str(path)]) == texts
    decoded = tiny_tokenizer.decode(ids_NT[2, 1:], skip_special_tokens=False)
    assert texts[2] == decoded.rstrip("\ufffd")


def test_seeds_and_settings_change_the_text(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = write(model, tiny_tokenizer, tmp_path / "a.jsonl")
    assert write(model, tiny_tokenizer, tmp_path / "b.jsonl") == first
    assert write(model, tiny_tokenizer, tmp_path / "c.jsonl", seed=1) != first
    assert write(model, tiny_tokenizer, tmp_path / "d.jsonl", seq_len=25) != first


def interrupted(how: str, whole: bytes) -> bytes:
    """What a killed run can leave of a file of batches of 3, 3 and 2 rows."""
    lines = whole.splitlines(keepends=True)
    return {
        "nothing": b"",
        "one batch": b"".join(lines[:3]),
        "half a batch": b"".join(lines[:5]),
        "torn line": b"".join(lines[:6]) + lines[6][:50],
        "last newline lost": whole[:-1],
        "zeros after a crash": b"".join(lines[:6]) + b"\0" * 300,
        "everything": whole,
    }[how]


@pytest.mark.parametrize(
    "how",
    ["nothing", "one batch", "half a batch", "torn line", "last newline lost", "everything"]
    + ["zeros after a crash"],
)
def test_resume_gives_the_uninterrupted_text(
    tiny_model, tiny_tokenizer, tmp_path: Path, how: str
) -> None:
    model, path, counter = tiny_model("llama"), tmp_path / "self.jsonl", Counter()
    texts = write(model, tiny_tokenizer, path)
    whole = path.read_bytes()
    path.write_bytes(interrupted(how, whole))
    assert write(model, tiny_tokenizer, path, progress=counter) == texts
    assert path.read_bytes() == whole
    assert counter.total == 24 * 8


def test_interrupt_within_a_batch_leaves_whole_batches(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    model, path = tiny_model("llama"), tmp_path / "self.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(model, tiny_tokenizer, path, progress=Counter(stop_at=24 * 3 + 10))
    assert len(path.read_text().splitlines()) == 3
    assert write(model, tiny_tokenizer, path) == write(
        model, tiny_tokenizer, tmp_path / "other.jsonl"
    )


def test_more_tokens_keep_the_whole_batches(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "self.jsonl"
    short = write(model, tiny_tokenizer, path)
    longer = write(model, tiny_tokenizer, path, tokens=24 * 12)
    assert longer == write(model, tiny_tokenizer, tmp_path / "new.jsonl", tokens=24 * 12)
    assert longer[:6] == short[:6] and len(longer) == 12
    assert [json.loads(line)["batch"] for line in path.open()] == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
    ]


def test_fewer_tokens_end_as_a_fresh_run(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "self.jsonl"
    write(model, tiny_tokenizer, path, tokens=24 * 9)
    assert write(model, tiny_tokenizer, path, tokens=24 * 5) == write(
        model, tiny_tokenizer, tmp_path / "new.jsonl", tokens=24 * 5
    )
    assert path.read_bytes() == (tmp_path / "new.jsonl").read_bytes()


def test_other_teacher_or_settings_are_refused(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "self.jsonl"
    write(tiny_model("llama"), tiny_tokenizer, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="another teacher or other sampling settings"):
        write(tiny_model("llama", seed=1), tiny_tokenizer, path)
    with pytest.raises(UserError, match="another teacher or other sampling settings"):
        write(tiny_model("llama"), tiny_tokenizer, path, seed=1)
    assert path.read_bytes() == before


def test_openings_differ_between_rows(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "self.jsonl"
    write(tiny_model("llama"), tiny_tokenizer, path, tokens=24 * 30, batch_size=30)
    rows = read_ids(path).tolist()
    assert len({tuple(row) for row in rows}) > 20
    assert len({tuple(row[:4]) for row in rows}) > 12
    chat = [row for row in rows if row[1] == tiny_tokenizer.bos_token_id]
    assert 1 <= len(chat) <= 14
