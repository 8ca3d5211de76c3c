"""Teacher outputs from disk equal live ones, whatever interrupted the writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill.teacher_pass import (
    CachedTeacher,
    LiveTeacher,
    TeacherPass,
    cache_bytes,
    cache_key,
    open_cache,
    recorded_blocks,
    write_cache,
)

Model = Callable[..., PreTrainedModel]
ROWS, SEQ_LEN, BLOCKS = 40, 12, 3


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 384, (ROWS, SEQ_LEN)).astype(np.int32)


@pytest.fixture
def ids_NT() -> np.ndarray:
    return token_ids()


def assert_same_outputs(actual: TeacherPass, expected: TeacherPass, rows: np.ndarray) -> None:
    """Equal to bfloat16's relative rounding error of 2⁻⁸ (with room for another batch's sums)."""
    mine, theirs = actual.blocks(rows), expected.blocks(rows)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-8, atol=1e-5)


def test_the_cache_equals_the_live_teacher(
    family: str, tiny_model: Model, ids_NT: np.ndarray, tmp_path: Path
) -> None:
    model = tiny_model(family)
    live, cached = (
        LiveTeacher(model, ids_NT, BLOCKS),
        write_cache(model, ids_NT, tmp_path, blocks=BLOCKS, batch_size=7),
    )
    rows = np.array([39, 0, 17])
    assert_same_outputs(cached, live, rows)
    blocks = cached.blocks(rows)
    assert [b.shape for b in blocks] == [(3, SEQ_LEN, 64)] * 3
    assert cached.path.stat().st_size == cache_bytes(model, ids_NT.size, BLOCKS)
    with pytest.raises(AssertionError):
        assert_same_outputs(cached, LiveTeacher(tiny_model(family, seed=1), ids_NT, BLOCKS), rows)
    with pytest.raises(AssertionError):
        assert_same_outputs(cached, LiveTeacher(model, ids_NT[::-1], BLOCKS), rows)


def test_the_last_block_alone(tiny_model: Model, ids_NT: np.ndarray, tmp_path: Path) -> None:
    """What training without the hidden-state term reads: a third of the bytes of three blocks."""
    model, rows = tiny_model("llama"), np.array([39, 0, 17])
    every = write_cache(model, ids_NT, tmp_path / "all", blocks=BLOCKS, batch_size=7)
    last = write_cache(model, ids_NT, tmp_path / "last", blocks=1, batch_size=7)
    assert len(last.blocks(rows)) == 1
    assert_same_outputs(last, LiveTeacher(model, ids_NT, 1), rows)
    torch.testing.assert_close(last.blocks(rows)[0], every.blocks(rows)[-1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(last.blocks(rows)[0], every.blocks(rows)[0])
    assert last.path.stat().st_size == cache_bytes(model, ids_NT.size, 1)
    assert every.path.stat().st_size == BLOCKS * last.path.stat().st_size


def test_recorded_blocks_are_the_models_own_hidden_states(family: str, tiny_model: Model) -> None:
    """The last block's output is what the final norm reads."""
    model, ids = tiny_model(family), torch.arange(3, 13)[None]
    with recorded_blocks(model) as outputs, torch.no_grad():
        final = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert len(outputs) == 3
    torch.testing.assert_close(model.model.norm(outputs[-1]), final)
    assert not any(m._forward_hooks for m in model.modules())


class Killed(BaseException):
    """Stands for kill -9 between two batches."""


def killed_after(batches: int) -> Callable[[int], None]:
    calls = 0

    def advance(tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise Killed

    return advance


@pytest.fixture(scope="module")
def whole(
    tiny_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, CachedTeacher]:
    """A model and its uninterrupted cache."""
    model = tiny_model("llama")
    return model, write_cache(
        model, token_ids(), tmp_path_factory.mktemp("whole"), blocks=BLOCKS, batch_size=1
    )


@pytest.mark.parametrize(("batches", "tail"), [(1, 0), (5, -100), (16, 1000), (17, 0), (33, -100)])
def test_an_interrupted_cache_ends_equal(
    batches: int,
    tail: int,
    whole: tuple[PreTrainedModel, CachedTeacher],
    ids_NT: np.ndarray,
    tmp_path: Path,
) -> None:
    """Killed after some batches, with the uncounted end of the file torn or full of rubbish."""
    model, uninterrupted = whole
    with pytest.raises(Killed):
        write_cache(
            model,
            ids_NT,
            tmp_path / "parts",
            blocks=BLOCKS,
            batch_size=1,
            advance=killed_after(batches + 1),
        )
    torn = open_cache(model, ids_NT, tmp_path / "parts", BLOCKS).path
    counted = batches // 16 * 16 * uninterrupted.row_bytes
    size = torn.stat().st_size
    with torn.open("r+b") as file:
        if tail > 0:
            file.seek(size)
            file.write(b"\xff" * tail)
        else:
            file.truncate(max(counted, size + tail))
    advanced: list[int] = []
    again = write_cache(
        model, ids_NT, tmp_path / "parts", blocks=BLOCKS, batch_size=1, advance=advanced.append
    )
    assert advanced[0] == batches // 16 * 16 * SEQ_LEN and sum(advanced) == ids_NT.size
    assert_same_file(again, uninterrupted)


def assert_same_file(actual: CachedTeacher, expected: CachedTeacher) -> None:
    assert actual.path.read_bytes() == expected.path.read_bytes()


def test_a_finished_cache_is_not_written_again_and_a_lost_file_is(
    tiny_model: Model, ids_NT: np.ndarray, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    cached = write_cache(model, ids_NT, tmp_path, blocks=BLOCKS, batch_size=4)
    written = cached.path.read_bytes()
    advanced: list[int] = []
    write_cache(model, ids_NT, tmp_path, blocks=BLOCKS, batch_size=4, advance=advanced.append)
    assert advanced == [ids_NT.size] and cached.path.read_bytes() == written
    for lose in (lambda: cached.path.unlink(), lambda: cached.path.write_bytes(written[:-1])):
        lose()
        write_cache(model, ids_NT, tmp_path, blocks=BLOCKS, batch_size=4)
        assert cached.path.read_bytes() == written
    cached.path.write_bytes(b"\x01" + written[1:])
    with pytest.raises(AssertionError):
        assert_same_file(
            cached, write_cache(model, ids_NT, tmp_path / "b", blocks=BLOCKS, batch_size=4)
        )


def test_the_key_follows_weights_tokens_and_shape(ids_NT: np.ndarray) -> None:
    changed = ids_NT.copy()
    changed[3, 3] += 1
    keys = [
        cache_key(f, ids)
        for f, ids in (("a", ids_NT), ("b", ids_NT), ("a", changed), ("a", ids_NT.reshape(20, 24)))
    ]
    assert len(set(keys)) == 4
    assert cache_key("a", np.asfortranarray(ids_NT)) == keys[0]
