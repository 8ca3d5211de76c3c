"""The TensorRT runner's logic on a fake device: never run on hardware.

The fake keeps device memory in one array that starts as rubbish, checks every access against its
allocation, runs the engine's graph in ONNX Runtime, records what is queued while a stream is
captured, and refuses to launch a graph whose execution context has changed since.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from transformers import PreTrainedTokenizerFast

import deploy.runner_trt
import deploy.trt_step
from deploy.runner import open_runner
from deploy.runner_trt import TrtRunner
from distill.artifact import UserError
from tests.deploy_engines import Engines, greedy_by_runner, greedy_by_torch

PROMPT = [5, 90, 201, 17, 33, 250, 8]
MAX_BATCH, MAX_SEQ, MAX_PAST = 3, 8, 40
RUBBISH = 0xFF  # NaN as a float, -1 as an integer
NAMES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class FakeCuda:
    """Device memory and one stream."""

    def __init__(self) -> None:
        self.memory = np.full(2**24, RUBBISH, np.uint8)
        self.allocated: dict[int, int] = {}
        self.top = 4096
        self.recording: list[Callable[[], None]] | None = None
        self.contexts: list[FakeContext] = []
        self.launches = self.captures = 0

    def allocate(self, size_bytes: int) -> int:
        pointer = self.top
        self.allocated[pointer] = size_bytes
        self.top += -(-size_bytes // 512) * 512 + 512
        assert self.top < self.memory.size, "the fake device is full"
        return pointer

    def free(self, pointer: int) -> None:
        size = self.allocated.pop(pointer)
        self.memory[pointer : pointer + size] = RUBBISH

    def view(self, pointer: int, size_bytes: int) -> np.ndarray:
        """Bytes that lie wholly within one allocation."""
        assert any(
            p <= pointer and pointer + size_bytes <= p + n for p, n in self.allocated.items()
        )
        return self.memory[pointer : pointer + size_bytes]

    def new_stream(self) -> int:
        return 1

    def queue(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None:
        assert self.recording is None and array.flags.c_contiguous
        self.view(pointer, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None:
        assert self.recording is None
        array.reshape(-1).view(np.uint8)[:] = self.view(pointer, array.nbytes)

    def clear(self, pointer: int, size_bytes: int, stream: int) -> None:
        self.queue(lambda: self.view(pointer, size_bytes).fill(0))

    def copy_rows(
        self, target: int, tp: int, source: int, sp: int, width: int, rows: int, stream: int
    ) -> None:
        assert width <= min(tp, sp)

        def work() -> None:
            for row in range(rows):
                piece = self.view(source + row * sp, width).copy()
                self.view(target + row * tp, width)[:] = piece

        self.queue(work)

    def synchronise(self, stream: int) -> None:
        assert self.recording is None, "a captured stream cannot be waited for"

    def begin_capture(self, stream: int) -> None:
        self.recording = []

    def end_capture(self, stream: int) -> Any:
        work, self.recording = self.recording, None
        self.captures += 1
        return work, [context.changes for context in self.contexts if context.profile == 1]

    def launch(self, graph: Any, stream: int) -> None:
        work, changes = graph
        assert changes == [c.changes for c in self.contexts if c.profile == 1], "stale graph"
        self.launches += 1
        for step in work:
            step()


class FakeContext:
    """tensorrt.IExecutionContext: the graph of a directory, within its profile's limits."""

    def __init__(self, cuda: FakeCuda, session: Any, limits: dict[str, dict[str, Any]]) -> None:
        self.cuda, self.session, self.limits = cuda, session, limits
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1
        self.changes = 0
        cuda.contexts.append(self)

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.profile = index

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        limits = self.limits[name]
        for size, low, high in zip(shape, limits["min"], limits["max"], strict=True):
            assert low <= size <= high, f"{name} {shape} is outside {limits}"
        self.shapes[name] = tuple(shape)
        self.changes += 1

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, f"{name} has no address"
        self.addresses[name] = address
        self.changes += 1

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        kept = ctypes.c_int64.from_address(addresses["logits_to_keep"]).value
        self.cuda.queue(lambda: self._run(shapes, addresses, kept))
        return True

    def _run(self, shapes: dict[str, Any], addresses: dict[str, int], kept: int) -> None:
        feed: dict[str, Any] = {"logits_to_keep": np.array([kept])}
        for item in self.session.get_inputs():
            if item.name != "logits_to_keep":
                dtype = np.dtype(NAMES[item.type])
                size = int(np.prod(shapes[item.name])) * dtype.itemsize
                data = self.cuda.view(addresses[item.name], size).view(dtype)
                feed[item.name] = data.reshape(shapes[item.name]).copy()
        names = [item.name for item in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feed), strict=True):
            view = self.cuda.view(addresses[name], array.nbytes)
            view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer)


def record_of(session: Any) -> dict[str, Any]:
    """What export writes into build.json of this graph."""
    sizes = {"batch": MAX_BATCH, "sequence": MAX_SEQ, "past": MAX_PAST}
    ends = {"prefill": MAX_SEQ, "decode": 1}
    profiles: dict[str, Any] = {}
    for profile, new in ends.items():
        sizes |= {"sequence": new, "total": MAX_PAST + new}
        least = {"past": 0}
        profiles[profile] = {
            item.name: {
                "min": [least.get(d, 1) if isinstance(d, str) else d for d in item.shape],
                "max": [sizes.get(d, d) for d in item.shape],
            }
            for item in session.get_inputs()
        }
    inputs = [
        {
            "name": i.name,
            "dtype": NAMES[i.type],
            "shape": [-1 if isinstance(d, str) else d for d in i.shape],
        }
        for i in session.get_inputs()
    ]
    inputs.append({"name": "logits_to_keep", "dtype": "int64", "shape": [1], "memory": "host"})
    outputs = [{"name": o.name, "dtype": NAMES[o.type]} for o in session.get_outputs()]
    limits = {"max_batch": MAX_BATCH, "max_seq": MAX_SEQ, "max_past": MAX_PAST}
    return {
        "flavour": "tensorrt", "version": "10.3.0", "targets": ["sm87"], "precision": "fp32",
        "logits": "input", "limits": limits, "profiles": profiles, "inputs": inputs,
        "outputs": outputs,
    }  # fmt: skip


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def runner(engines: Engines, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> TrtRunner:
    monkeypatch.setattr(deploy.trt_step, "DECODE_COLUMNS", 8)
    directory = engines.onnx("fp32", "standard")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    record = record_of(session)
    contexts = {n: FakeContext(cuda, session, record["profiles"][n]) for n in ("prefill", "decode")}
    return TrtRunner(directory, record, contexts, cuda)


def test_greedy_equals_pytorch_across_graphs(
    engines: Engines, runner: TrtRunner, cuda: FakeCuda
) -> None:
    """30 steps behind 7 tokens: caches of 8, 16, 24, 32 and 40 columns, a graph for each."""
    assert greedy_by_runner(runner, PROMPT, 30) == greedy_by_torch(engines.model, PROMPT, 30)
    assert (cuda.launches, cuda.captures) == (29, 5)


def test_one_wrong_pitch_would_show(
    engines: Engines, runner: TrtRunner, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the cache moved by a column too few."""
    right = cuda.copy_rows

    def wrong(target: int, tp: int, source: int, sp: int, *rest: Any) -> None:
        capturing = cuda.recording is not None
        right(target, tp, source - 64 if capturing else source, sp, *rest)

    monkeypatch.setattr(cuda, "copy_rows", wrong)
    with pytest.raises(AssertionError):
        assert greedy_by_runner(runner, PROMPT, 30) == greedy_by_torch(engines.model, PROMPT, 30)


def test_long_prompts_are_run_in_pieces(engines: Engines, runner: TrtRunner) -> None:
    ids_BS = np.arange(10, 29)[None]
    expected = open_runner(engines.onnx("fp32"), threads=1)
    for keep in (1, 4, 9, None):
        whole = expected.forward(ids_BS, expected.new_cache(1), logits_to_keep=keep)
        pieces = runner.forward(ids_BS, runner.new_cache(1), logits_to_keep=keep)
        assert pieces.shape == whole.shape
        np.testing.assert_allclose(pieces, whole, atol=1e-3)


def test_rows_come_and_go_between_steps(engines: Engines, runner: TrtRunner) -> None:
    """Prefill, decode, another prompt joins, one leaves, more tokens at once: as ONNX Runtime."""
    reference = open_runner(engines.onnx("fp32"), threads=1)
    found = []
    for each in (runner, reference):
        cache = each.new_cache(2)
        ids_BS = np.array([[0, 0, 40, 41], [9, 8, 7, 6]])
        mask_BT = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
        logits = [each.forward(ids_BS, cache, attention_mask_BT=mask_BT, logits_to_keep=1)]
        mask_BT = np.pad(mask_BT, ((0, 0), (0, 1)), constant_values=1)
        step_B1 = np.array([[11], [12]])
        logits.append(each.forward(step_B1, cache, attention_mask_BT=mask_BT, logits_to_keep=1))
        other = each.new_cache(1)
        each.forward(np.array([[3, 4, 5]]), other)
        cache = cache.concat(other).select([2, 0])
        assert (cache.batch, cache.length) == (2, 5)
        mask_BT = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
        mask_BT = np.pad(mask_BT, ((0, 0), (0, 1)), constant_values=1)
        ids = np.array([[21], [22]])
        logits.append(each.forward(ids, cache, attention_mask_BT=mask_BT, logits_to_keep=1))
        cache.replace([1], other)
        mask_BT[1] = [0, 0, 0, 1, 1, 1]
        for new in (1, 1, 3, 1):
            mask_BT = np.pad(mask_BT, ((0, 0), (0, new)), constant_values=1)
            ids = np.full((2, new), 70 + new)
            logits.append(each.forward(ids, cache, attention_mask_BT=mask_BT, logits_to_keep=1))
        found.append(np.concatenate(logits))
        assert cache.length == 12
        assert cache.trim_left(2).truncate(5).pad_left(1).length == 6
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_two_caches_in_turn_take_their_own_graphs(engines: Engines, runner: TrtRunner) -> None:
    first, second = runner.new_cache(1), runner.new_cache(1)
    runner.forward(np.array([PROMPT]), first)
    runner.forward(np.array([[1, 2, 3]]), second)
    reference = open_runner(engines.onnx("fp32"), threads=1)
    expected = [reference.new_cache(1), reference.new_cache(1)]
    reference.forward(np.array([PROMPT]), expected[0])
    reference.forward(np.array([[1, 2, 3]]), expected[1])
    for token in (50, 60, 70):
        for cache, same in zip((first, second), expected, strict=True):
            a = runner.forward(np.array([[token]]), cache)
            b = reference.forward(np.array([[token]]), same)
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_device_memory_is_given_back(runner: TrtRunner, cuda: FakeCuda) -> None:
    greedy_by_runner(runner, PROMPT, 20)
    before = len(cuda.allocated)
    for _ in range(3):
        greedy_by_runner(runner, PROMPT, 20)
    assert len(cuda.allocated) <= before
    runner.close()
    runner._layout = None  # type: ignore[assignment]
    assert not cuda.allocated


def test_limits_of_the_engine(runner: TrtRunner) -> None:
    assert (runner.max_batch, runner.max_new, runner.max_context) == (MAX_BATCH, MAX_SEQ, MAX_PAST)
    with pytest.raises(UserError, match="batch of 4; .*built for 3"):
        runner.new_cache(4)
    with pytest.raises(UserError, match="41 tokens of context; .*allows 40"):
        runner.forward(np.ones((1, 41), np.int64), runner.new_cache(1))
    runner._record = {**runner._record, "logits": "last"}
    with pytest.raises(UserError, match="logits of 3 positions"):
        runner.forward(np.ones((1, 3), np.int64), runner.new_cache(1))


def test_opening_without_gpu_tensorrt_or_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {
        "schema": 1, "flavour": "tensorrt", "version": "10.3.0", "targets": ["sm87"],
        "engine": {}, "precision": "fp16", "onnx": {}, "inputs": [],
    }  # fmt: skip
    (tmp_path / "build.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="tensorrt"):
        open_runner(tmp_path)
    monkeypatch.setattr(deploy.runner_trt, "load_tensorrt", lambda flavour: onnx)
    monkeypatch.setattr(deploy.runner_trt, "gpu_sm", lambda: None)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        open_runner(tmp_path)
    monkeypatch.setattr(deploy.runner_trt, "gpu_sm", lambda: "sm89")
    monkeypatch.setattr(onnx, "__version__", "10.3.0")
    with pytest.raises(UserError, match="sm89"):
        open_runner(tmp_path)
