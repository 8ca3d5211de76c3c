"""ONNX Runtime behind the runners' interface: equal to PyTorch, batched equal to single, caches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from deploy.host_cache import HostCache
from deploy.ort_binding import BoundStep
from deploy.ort_inplace import InPlaceStep
from deploy.runner import open_runner, positions_of
from distill.artifact import UserError
from tests.deploy_engines import Engines, greedy_by_runner, greedy_by_torch, set_config

STEPS = 24
FP32, INT8 = 1e-4, 1e-2  # of the largest logit
PROMPT = [5, 90, 201, 17, 33, 250, 8]


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer)


@pytest.fixture(params=["run", "binding", "in place"])
def runner(engines: Engines, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The CPU's paths, and the one of GPUs with the CPU as its device."""
    is_in_place = request.param == "in place"
    directory = engines.in_place() if is_in_place else engines.engine("fp32")
    runner: Any = open_runner(directory, threads=1)
    assert isinstance(runner._bound, InPlaceStep) == is_in_place
    if request.param == "binding":
        runner._bound = BoundStep(runner.model, "cpu")
    yield runner
    runner.close()


def logits_of(runner: Any, ids_BS: np.ndarray, mask_BT: np.ndarray, past: Any = None) -> np.ndarray:
    cache = past or runner.new_cache(len(ids_BS))
    return runner.forward(ids_BS, cache, attention_mask_BT=mask_BT, logits_to_keep=1)[:, -1]


def assert_close(a: np.ndarray, b: np.ndarray, limit: float = FP32) -> None:
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.abs(a - b).max() <= limit * np.abs(b).max()


def left_padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    columns = max(map(len, prompts))
    ids_BS = np.zeros((len(prompts), columns), np.int64)
    mask_BS = np.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, columns - len(prompt) :] = prompt
        mask_BS[row, columns - len(prompt) :] = 1
    return ids_BS, mask_BS


def test_greedy_equals_pytorch(engines: Engines, runner: Any) -> None:
    assert greedy_by_runner(runner, PROMPT, STEPS) == greedy_by_torch(engines.model, PROMPT, STEPS)


def test_another_model_continues_otherwise(engines: Engines, runner: Any) -> None:
    """The twin: were one weight different, the comparison above would show it."""
    broken = engines.model
    weight = broken.model.layers[0].mlp.down_proj.weight
    saved = weight.data.clone()
    weight.data.mul_(-1)
    try:
        other = greedy_by_torch(broken, PROMPT, STEPS)
    finally:
        weight.data.copy_(saved)
    assert greedy_by_runner(runner, PROMPT, STEPS) != other


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_greedy_of_every_precision_is_its_own_graphs(engines: Engines, precision: str) -> None:
    """Decoding with a cache gives what whole prompts without one give, on the same graph."""
    runner = open_runner(engines.engine(precision), threads=1)
    with_cache = greedy_by_runner(runner, PROMPT, 12)
    ids = list(PROMPT)
    for token in with_cache:
        mask_BT = np.ones((1, len(ids)), np.int64)
        logits_V = logits_of(runner, np.array([ids]), mask_BT)[0]
        gap = logits_V.max() - logits_V[token]
        assert gap <= 1e-2 * np.abs(logits_V).max()
        ids.append(token)
    assert runner.describe()["precision"] == precision


def test_precisions_stay_near_pytorch(engines: Engines) -> None:
    with torch.no_grad():
        expected_SV = engines.model(torch.tensor([PROMPT])).logits[0].numpy()
    scale = np.abs(expected_SV).max()
    for precision, limit in (("fp32", 1e-4), ("fp16", 2e-2), ("int8", 5e-2), ("int4", 0.6)):
        runner = open_runner(engines.engine(precision), threads=1)
        logits_BSV = runner.forward(np.array([PROMPT]), runner.new_cache(1))
        assert logits_BSV.dtype == np.float32
        assert np.abs(logits_BSV[0] - expected_SV).max() <= limit * scale


def test_a_batch_of_unequal_rows_equals_each_alone(runner: Any) -> None:
    prompts = [PROMPT, [40, 41], [9, 8, 7, 6]]
    ids_BS, mask_BT = left_padded(prompts)
    cache = runner.new_cache(3)
    batched_BV = logits_of(runner, ids_BS, mask_BT, cache)
    alone = [runner.new_cache(1) for _ in prompts]
    for row, prompt in enumerate(prompts):
        single_V = logits_of(runner, np.array([prompt]), np.ones((1, len(prompt))), alone[row])
        assert_close(batched_BV[row], single_V[0])
    for _ in range(5):
        token_B1 = batched_BV.argmax(-1)[:, None]
        mask_BT = np.concatenate([mask_BT, np.ones((3, 1), np.int64)], axis=1)
        batched_BV = logits_of(runner, token_B1, mask_BT, cache)
        for row in range(3):
            total = alone[row].length + 1
            single_V = logits_of(runner, token_B1[[row]], np.ones((1, total)), alone[row])
            assert_close(batched_BV[row], single_V[0])


def test_a_batch_without_its_mask_is_wrong(runner: Any) -> None:
    """The twin: padding that is taken for text changes the shorter row."""
    ids_BS, mask_BT = left_padded([PROMPT, [40, 41]])
    right_BV = logits_of(runner, ids_BS, mask_BT)
    wrong_BV = logits_of(runner, ids_BS, np.ones_like(mask_BT))
    assert_close(right_BV[0], wrong_BV[0])
    with pytest.raises(AssertionError):
        assert_close(right_BV[1], wrong_BV[1])


def continued(runner: Any, cache: Any, mask_BT: np.ndarray) -> np.ndarray:
    """Logits behind one more token in every row."""
    ids_B1 = np.full((cache.batch, 1), 77)
    mask_BT = np.concatenate([mask_BT, np.ones((cache.batch, 1), np.int64)], axis=1)
    return logits_of(runner, ids_B1, mask_BT, cache)


def test_rows_are_dropped_reordered_and_repeated(runner: Any) -> None:
    ids_BS, mask_BT = left_padded([PROMPT, [40, 41], [9, 8, 7, 6]])
    cache = runner.new_cache(3)
    logits_of(runner, ids_BS, mask_BT, cache)
    rows = [2, 0, 0]
    chosen = cache.select(rows)
    assert (chosen.batch, chosen.length, cache.batch, cache.length) == (3, 7, 3, 7)
    selected_BV = continued(runner, chosen, mask_BT[rows])
    whole_BV = continued(runner, cache, mask_BT)
    assert_close(selected_BV, whole_BV[rows])
    with pytest.raises(AssertionError):
        assert_close(selected_BV, whole_BV)
    with pytest.raises(IndexError, match="3 rows"):
        cache.select([3])


def test_caches_of_unequal_length_are_joined(runner: Any) -> None:
    long, short = runner.new_cache(1), runner.new_cache(2)
    logits_of(runner, np.array([PROMPT]), np.ones((1, 7)), long)
    ids_BS, mask_BT = left_padded([[40, 41], [9]])
    logits_of(runner, ids_BS, mask_BT, short)
    joined = short.concat(long)
    assert (joined.batch, joined.length) == (3, 7)
    padded_BT = np.pad(mask_BT, ((0, 0), (5, 0)))
    joined_BV = continued(runner, joined, np.concatenate([padded_BT, np.ones((1, 7), np.int64)]))
    assert_close(joined_BV[:2], continued(runner, short, mask_BT))
    assert_close(joined_BV[2:], continued(runner, long, np.ones((1, 7), np.int64)))


def test_a_cache_that_lost_rows_and_columns_takes_others(runner: Any) -> None:
    expected = [alone(runner, prompt) for prompt in ([40, 41], [9, 8, 7, 6], PROMPT)]
    check_compact_and_extend(runner, expected, FP32)


def test_an_int8_cache_that_lost_rows_and_columns_takes_others(engines: Engines) -> None:
    runner = open_runner(engines.in_place("int8"), threads=1)
    expected = [alone(runner, prompt) for prompt in ([40, 41], [9, 8, 7, 6], PROMPT)]
    check_compact_and_extend(runner, expected, INT8)


def alone(runner: Any, prompt: list[int]) -> np.ndarray:
    """Logits [V] behind one more token than the prompt, in a cache of one row."""
    cache, mask_BT = runner.new_cache(1), np.ones((1, len(prompt)), np.int64)
    logits_of(runner, np.array([prompt]), mask_BT, cache)
    return continued(runner, cache, mask_BT)[0]


def check_compact_and_extend(runner: Any, expected: list[np.ndarray], limit: float) -> None:
    """The longest row ends and its columns go, once in use; then a longer one joins."""
    ids_BS, mask_BT = left_padded([PROMPT, [40, 41], [9, 8, 7, 6]])
    cache, other = runner.new_cache(3), runner.new_cache(1)
    logits_of(runner, ids_BS, mask_BT, cache)
    continued(runner, cache, mask_BT)
    cache = cache.truncate(7).compact([1, 2], 3)
    mask_BT = mask_BT[1:, 3:]
    for found_V, expected_V in zip(continued(runner, cache, mask_BT), expected[:2], strict=True):
        assert_close(found_V, expected_V, limit)
    cache = cache.truncate(4)
    logits_of(runner, np.array([PROMPT]), np.ones((1, 7), np.int64), other)
    cache = cache.extend(other)
    assert (cache.batch, cache.length) == (3, 7)
    mask_BT = np.concatenate([np.pad(mask_BT, ((0, 0), (3, 0))), np.ones((1, 7), np.int64)])
    found_BV = continued(runner, cache, mask_BT)
    for found_V, expected_V in zip(found_BV, expected, strict=True):
        assert_close(found_V, expected_V, limit)
    with pytest.raises(AssertionError):
        assert_close(found_BV[0], expected[1], limit)


def test_rows_take_the_places_of_others(runner: Any) -> None:
    ids_BS, mask_BT = left_padded([PROMPT, [40, 41], [9, 8, 7, 6]])
    cache, other = runner.new_cache(3), runner.new_cache(2)
    logits_of(runner, ids_BS, mask_BT, cache)
    other_BS, other_BT = left_padded([[61, 62, 63], [5]])
    logits_of(runner, other_BS, other_BT, other)
    cache.replace([2, 0], other)
    assert (cache.batch, cache.length, other.length) == (3, 7, 3)
    mask_BT[[2, 0]] = np.pad(other_BT, ((0, 0), (4, 0)))
    found_BV = continued(runner, cache, mask_BT)
    alone_BV = continued(runner, other, other_BT)
    assert_close(found_BV[[2, 0]], alone_BV)
    single = runner.new_cache(1)
    logits_of(runner, np.array([[40, 41]]), np.ones((1, 2), np.int64), single)
    assert_close(found_BV[[1]], continued(runner, single, np.ones((1, 2), np.int64)))
    with pytest.raises(AssertionError):
        assert_close(found_BV[[0, 2]], alone_BV)
    for rows, rest in (([0], other), ([0, 1, 2], cache.pad_left(9))):
        with pytest.raises(ValueError, match="columns into"):
            cache.replace(rows, rest)


def test_columns_are_padded_trimmed_and_taken_back(runner: Any) -> None:
    cache, mask_BT = runner.new_cache(1), np.ones((1, 7), np.int64)
    logits_of(runner, np.array([PROMPT]), mask_BT, cache)
    wide = cache.pad_left(4)
    assert wide.length == 11
    narrow = wide.trim_left(4)
    back = narrow.truncate(3)
    assert (narrow.length, back.length, cache.length) == (7, 3, 7)
    shorter = runner.new_cache(1)
    logits_of(runner, np.array([PROMPT[:3]]), np.ones((1, 3)), shorter)
    expected = continued(runner, shorter, np.ones((1, 3), np.int64))
    assert_close(continued(runner, back, np.ones((1, 3), np.int64)), expected)
    padded = continued(runner, wide, np.pad(mask_BT, ((0, 0), (4, 0))))
    assert_close(padded, continued(runner, cache, mask_BT))
    for wrong in (lambda: narrow.trim_left(99), lambda: narrow.truncate(-1)):
        with pytest.raises(ValueError, match="columns"):
            wrong()


def test_logits_of_the_positions_asked_for(runner: Any) -> None:
    ids_BS = np.array([PROMPT])
    every = runner.forward(ids_BS, runner.new_cache(1))
    assert every.shape == (1, 7, runner.vocabulary)
    for keep in (1, 3, 99):
        kept = runner.forward(ids_BS, runner.new_cache(1), logits_to_keep=keep)
        assert_close(kept, every[:, -keep:])


def test_a_prompt_in_pieces_equals_the_whole(runner: Any) -> None:
    whole = runner.forward(np.array([PROMPT]), runner.new_cache(1), logits_to_keep=1)
    cache = runner.new_cache(1)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        piece = runner.forward(np.array([PROMPT[start:end]]), cache, logits_to_keep=1)
    assert_close(piece, whole)


def test_positions_count_real_tokens() -> None:
    mask_BT = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]])
    np.testing.assert_array_equal(positions_of(mask_BT, 3), [[0, 1, 2], [1, 1, 2]])


def test_what_it_says_of_itself(engines: Engines) -> None:
    directory = engines.engine("int8")
    runner = open_runner(directory, threads=1)
    said = runner.describe()
    assert (said["engine"], said["precision"], said["provider"]) == ("onnxruntime", "int8", "cpu")
    assert said["threads"] == 1
    assert said["weight_bytes"] == sum(f.stat().st_size for f in directory.glob("model.onnx*"))
    assert (runner.vocabulary, runner.max_context, runner.eos_token_ids) == (384, 512, (2,))
    assert runner.cache_bytes_per_token == 3 * 2 * 2 * 16 * 4


def test_limits_are_errors(engines: Engines, runner: Any) -> None:
    with pytest.raises(UserError, match="513 tokens of context; .*allows 512"):
        runner.forward(np.ones((1, 513), np.int64), runner.new_cache(1))
    with pytest.raises(ValueError, match="2 rows of input"):
        runner.forward(np.ones((2, 1), np.int64), runner.new_cache(1))
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.new_cache(1)


def test_a_directory_without_an_engine(engines: Engines, tmp_path: Path) -> None:
    for directory, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "no artefact"),
        (engines.student, "is a student"),
    ):
        with pytest.raises(UserError, match=said):
            open_runner(directory)


def test_a_damaged_engine_is_refused_by_hash(engines: Engines, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(engines.engine("int8"), tmp_path / "copy"))
    path = directory / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="sha256"):
        open_runner(directory)


def test_end_tokens_of_the_generation_config(engines: Engines, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(engines.onnx("fp32"), tmp_path / "copy"))
    set_config(directory, "generation_config.json", eos_token_id=[7, 2, 7])
    assert open_runner(directory, verify=False).eos_token_ids == (7, 2)
    set_config(directory, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(UserError, match="eos_token_id '</s>'"):
        open_runner(directory, verify=False)


def test_padding_columns_are_zeros() -> None:
    cache = HostCache([np.ones((2, 3, 4, 5), np.float32)])
    wide = cache.pad_left(2).values[0]
    assert wide.shape == (2, 3, 6, 5)
    assert wide[:, :, :2].sum() == 0 and (wide[:, :, 2:] == 1).all()
