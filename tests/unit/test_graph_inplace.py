"""Attention that appends in place: rewritten, refused, equal to the copying one, flat in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from transformers import PreTrainedTokenizerFast

from deploy.ort_inplace import InPlaceStep
from deploy.runner import open_runner
from deploy.runner_ort import OrtRunner
from deploy.server_batch import Batch, Prefill
from deploy.slab_cache import COLUMNS
from distill.modeling_budgeted import MODEL_CLASSES
from export.graph_inplace import append_in_place, rewrite
from export.lower import lower, save_onnx
from export.session import IN_PLACE, OrtModel
from tests.deploy_engines import Engines

CLOSE = 1e-4


@pytest.fixture(scope="module", params=sorted(MODEL_CLASSES))
def engines(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Engines:
    return Engines(tmp_path_factory.mktemp("run"), tiny_tokenizer, request.param)


def graph_of(directory: Path) -> onnx.ModelProto:
    return onnx.load(directory / "model.onnx", load_external_data=False)


def pieces(model: OrtModel) -> list[np.ndarray]:
    """Logits of a padded batch: a prompt, a piece behind it, a token behind both."""
    ids_BS = np.random.default_rng(1).integers(5, model.vocabulary, (2, 12))
    mask_BS = np.ones_like(ids_BS)
    mask_BS[1, :4] = 0
    positions_BS = np.maximum(mask_BS.cumsum(1) - 1, 0)
    past, logits, done = None, [], 0
    for end in (6, 11, 12):
        part = slice(done, end)
        found, past = model.step(ids_BS[:, part], mask_BS[:, :end], positions_BS[:, part], past)
        assert all(value.shape[2] == end for value in past)
        logits.append(found[0])
        logits.append(found[1, max(0, 4 - done) :])
        done = end
    return logits


def test_every_family_is_rewritten_and_computes_the_same(engines: Engines) -> None:
    """Bound to nothing, the cache grows as it did before."""
    before, after = graph_of(engines.engine()), graph_of(engines.in_place())
    kinds = [node.op_type for node in after.graph.node]
    assert "Attention" not in kinds
    assert kinds.count("GroupQueryAttention") == sum(
        node.op_type == "Attention" for node in before.graph.node
    )
    for side in ("input", "output"):
        assert getattr(after.graph, side) == getattr(before.graph, side)
    found, expected = (
        pieces(OrtModel.open(directory, threads=1))
        for directory in (engines.in_place(), engines.engine())
    )
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= CLOSE * np.abs(other).max()


def test_in_place_equals_copying(engines: Engines) -> None:
    """Whatever the unused part of the buffers holds."""
    runners = [open_runner(d, threads=1) for d in (engines.in_place(), engines.engine())]
    assert [isinstance(r._bound, InPlaceStep) for r in runners] == [True, False]  # type: ignore[attr-defined]
    caches: list[Any] = [runner.new_cache(2) for runner in runners]
    caches[0].reserve(1)
    for slab in caches[0].slabs:
        slab.fill(np.nan)
    ids = np.random.default_rng(2).integers(5, runners[0].vocabulary, (2, 3 + COLUMNS))
    done = 0
    for end in (3, *range(4, 4 + COLUMNS)):
        one, other = (
            runner.forward(ids[:, done:end], cache, logits_to_keep=1)
            for runner, cache in zip(runners, caches, strict=True)
        )
        assert np.abs(one - other).max() <= CLOSE * np.abs(other).max()
        done = end


def test_a_layer_without_attention_keeps_its_zeros(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engines = Engines(tmp_path, tiny_tokenizer)
    directory = engines.in_place()
    kinds = [node.op_type for node in graph_of(directory).graph.node]
    assert kinds.count("GroupQueryAttention") == 2  # of three layers
    runner = open_runner(directory, threads=1)
    cache = runner.new_cache(1)
    runner.forward(np.array([[5, 6, 7]]), cache)
    assert sum(not view[:, :, :3].any() for view in cache.views()) == 2


def attention_model(**changed: Any) -> onnx.ModelProto:
    """One attention as the ort flavour emits it, head size 16."""
    size = changed.pop("size", 16)
    floats = onnx.TensorProto.FLOAT
    cache = ["batch", 2, "past", size]
    inputs = {"q": [1, 1, 4 * size], "k": [1, 1, 2 * size], "v": [1, 1, 2 * size]}
    values = [helper.make_tensor_value_info(n, floats, s) for n, s in inputs.items()]
    values += [helper.make_tensor_value_info(n, floats, cache) for n in ("pk", "pv")]
    values.append(helper.make_tensor_value_info("mask", floats, [1, 1, 1, "total"]))
    outputs = [helper.make_tensor_value_info(n, floats, None) for n in ("y", "nk", "nv")]
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "softcap": 0.0} | changed
    node = helper.make_node(
        "Attention", ["q", "k", "v", "mask", "pk", "pv"], ["y", "nk", "nv"], **attributes
    )
    graph = helper.make_graph([node], "g", values, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_attention_of_another_form_is_left_alone() -> None:
    assert rewrite(attention_model())
    for changed in ({"softcap": 30.0}, {"is_causal": 1}, {"size": 12}):
        model = attention_model(**changed)
        before = model.SerializeToString()
        assert not rewrite(model)
        assert model.SerializeToString() == before


def test_an_older_runtime_gets_the_copying_graph(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = Engines(tmp_path, tiny_tokenizer).engine() / "model.onnx"
    before = path.read_bytes()
    assert not append_in_place(path, "1.31.1")
    assert path.read_bytes() == before
    assert append_in_place(path, "1.32.0")
    assert IN_PLACE in {entry.key for entry in graph_of(path.parent).metadata_props}


def test_decoding_rows_that_come_and_go_moves_no_memory(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Once the batch has been as large as it gets, the arrays of the cache stay the same ones."""
    runner = OrtRunner.open(Engines(tmp_path, tiny_tokenizer).in_place(), threads=1)
    batch: Batch[int] = prompts(runner, [30, 20, 12])
    places = set()
    for step in range(90):
        batch.step([7] * len(batch.rows))
        if step % 10 == 9:
            batch.remove(step // 10 % 3)
            batch.compact()
            batch.join(prompts(runner, [20]))
        if step >= 60:
            places.add(tuple(slab.ctypes.data for slab in batch.cache.slabs))
    assert len(places) == 1
    assert batch.columns <= batch.cache.slabs[0].shape[2] <= batch.columns + 2 * COLUMNS


def prompts(runner: OrtRunner, lengths: list[int]) -> Batch[int]:
    prefill = Prefill(runner, lengths, [[9] * length for length in lengths])
    while prefill.advance(16) is None:
        pass
    return prefill.batch


def test_the_exported_graph_is_not_rewritten(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """optimum, TensorRT and GPUs read it."""
    engines = Engines(tmp_path / "run", tiny_tokenizer)
    save_onnx(lower(engines.student, flavour="ort", precision="fp32"), tmp_path)
    assert "GroupQueryAttention" not in {node.op_type for node in graph_of(tmp_path).graph.node}
