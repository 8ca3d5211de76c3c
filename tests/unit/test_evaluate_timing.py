"""The timing function on calls of known cost; scenarios, ceilings and the bare module stacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from deploy.ceilings import MeasuredCeilings
from distill.plan import Decision, Plan
from evaluate.ceilings import device_ceilings
from evaluate.contenders import Contender
from evaluate.latency import Scenario, figures, floor_seconds, scenarios, time_contenders
from evaluate.module_stack import layer_of, stack_inputs, stack_model
from evaluate.module_time import time_modules, timed_layers
from evaluate.timing import Timed, Timing, interleaved_timings

SLEEP_S = 0.02


class Work:
    """A clock that only work moves: each call costs what it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def spend(self, name: str, seconds: float) -> Callable[[Any], None]:
        def call(_: Any) -> None:
            self.order.append(name)
            self.now_s += seconds

        return call


def test_known_costs_come_back_exactly() -> None:
    work = Work()
    costs = iter([9.0, *(float(n) for n in range(1, 22))])  # warm-up, then 1 to 21 s

    def varying(_: Any) -> None:
        work.now_s += next(costs)

    timings, failures = interleaved_timings(
        {"varying": Timed(varying), "steady": Timed(work.spend("steady", 0.5))},
        rounds=21, pause_s=0, clock=work.clock,
    )  # fmt: skip
    assert not failures
    assert timings["steady"].samples_s == (0.5,) * 21
    figures = timings["varying"].to_json()
    assert figures == {"median_ms": 11e3, "p5_ms": 2e3, "p95_ms": 20e3, "samples": 21}


def test_setup_is_not_timed_and_its_result_is_handed_over() -> None:
    work = Work()
    seen = []

    def setup() -> str:
        work.now_s += 100
        return "prepared"

    def call(prepared: str) -> None:
        seen.append(prepared)
        work.now_s += 2

    timings, _ = interleaved_timings(
        {"a": Timed(call, setup)}, rounds=3, pause_s=0, clock=work.clock
    )
    assert timings["a"].samples_s == (2, 2, 2) and seen == ["prepared"] * 4


def test_rounds_start_with_another_contender_each_time() -> None:
    work = Work()
    contenders = {name: Timed(work.spend(name, 1)) for name in "abc"}
    interleaved_timings(contenders, rounds=2, warmup=1, pause_s=0, clock=work.clock)
    assert "".join(work.order) == "abcbcacab"


def test_one_that_fails_is_reported_and_the_others_are_timed() -> None:
    work = Work()
    calls = []

    def broken(_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    timings, failures = interleaved_timings(
        {"broken": Timed(broken), "whole": Timed(work.spend("whole", 1))},
        rounds=4, pause_s=0, clock=work.clock,
    )  # fmt: skip
    assert len(calls) == 2 and str(failures["broken"]) == "out of memory"
    assert list(timings) == ["whole"] and len(timings["whole"].samples_s) == 4


def test_the_device_is_waited_for_before_the_clock_is_read() -> None:
    """An asynchronous call looks free until it is synchronised."""
    work = Work()
    queued = []

    def synchronise() -> None:
        work.now_s += sum(queued)
        queued.clear()

    timings, _ = interleaved_timings(
        {"a": Timed(lambda _: queued.append(3.0), lambda: queued.append(50.0))},
        rounds=2, pause_s=0, clock=work.clock, synchronise=synchronise,
    )  # fmt: skip
    assert timings["a"].samples_s == (3, 3)


def test_a_real_sleep_is_measured_as_long_as_it_is() -> None:
    timings, _ = interleaved_timings({"sleep": Timed(lambda _: time.sleep(SLEEP_S))}, rounds=5)
    samples = timings["sleep"].samples_s
    assert SLEEP_S <= min(samples) < 2 * SLEEP_S, "the quietest round, if the machine is busy"


def contender(precision: str = "fp32", target: int = 1000, head: int = 200) -> Contender:
    return Contender(
        "c", "dense", "r", "ort", precision, "cpu", None, "", target, head, 1.0, 1.0, None
    )


CEILINGS = MeasuredCeilings(1, 1000.0, {"fp32": 1e5})


def test_floors_follow_from_bytes_and_operations() -> None:
    decode, prefill = Scenario("decode", 1, 8, 10), Scenario("prefill", 2, 100)
    assert floor_seconds(decode, contender(), CEILINGS) == (10 * 4 * 1200 / 1000, "memory")
    assert floor_seconds(decode, contender("int4"), CEILINGS)[0] == 10 * 0.625 * 1200 / 1000
    operations = 2 * (200 * 1000 + 2 * 200)
    seconds, bound = floor_seconds(prefill, contender("int4"), CEILINGS)
    assert (seconds, bound) == (pytest.approx(operations / 1e5), "matmul")


class Columns:
    """A cache that only knows its size."""

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length

    def select(self, rows: Any) -> Columns:
        return Columns(len(rows), self.length)


class Counting:
    """A runner that says which tokens it was given, and takes two milliseconds for each column."""

    vocabulary, max_context, max_new, max_batch = 50, 64, None, 2

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def new_cache(self, batch: int) -> Any:
        return Columns(batch, 0)

    def forward(self, input_ids_BS: np.ndarray, cache: Any, **_: Any) -> np.ndarray:
        self.shapes.append(input_ids_BS.shape)
        cache.length += input_ids_BS.shape[1]
        self.now_s += 0.002 * input_ids_BS.shape[1]
        return np.zeros((len(input_ids_BS), 1, 50), np.float32)


def test_ceilings_of_a_device_have_a_rate_for_each_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evaluate.ceilings.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("evaluate.ceilings.READ_BYTES", 2**20)
    found = device_ceilings("cpu", 1)
    assert found.memory_bytes_per_s > 0 and found.threads == 1
    assert set(found.matmul_operations_per_s) == {"fp32", "bf16", "fp16"}
    assert min(found.matmul_operations_per_s.values()) > 0


def test_prefill_and_decode_speeds_of_a_runner_of_known_speed() -> None:
    runner = Counting()
    todo = scenarios((10,), (1, 2, 4), 5)
    assert [s.name for s in todo] == [
        f"{kind}-b{batch}-p10" for kind in ("prefill", "decode") for batch in (1, 2, 4)
    ]
    rows, failed = time_contenders(
        {"c": runner}, {"c": contender()}, todo, {"cpu": CEILINGS}, rounds=3, clock=runner.clock
    )
    by_name = {row["scenario"]: row for row in rows["c"]}
    assert not failed
    assert set(by_name) == {s.name for s in todo if s.batch != 4}, "the engine takes two rows"
    prefill, decode = by_name["prefill-b2-p10"], by_name["decode-b1-p10"]
    assert prefill["tokens_per_s"] == pytest.approx(20 / 0.020)
    assert decode["tokens_per_s"] == pytest.approx(5 / 0.010), "the prompt's prefill is not timed"
    assert decode["ceiling_fraction"] == pytest.approx(
        decode["tokens_per_s"] / decode["ceiling_tokens_per_s"]
    )
    assert runner.shapes.count((1, 10)) == 4 + 1, "one prefill for all the decoding behind it"
    on_gpu = replace(contender(), provider="cuda")
    assert "ceiling_fraction" not in figures(todo[0], Timing((1.0,)), on_gpu, {"cpu": CEILINGS})
    assert decode["tokens_per_s_p5"] <= decode["tokens_per_s"] <= decode["tokens_per_s_p95"]


def decision(
    layer: int, name: str, rank: int | None, width: int | None, out: int, into: int
) -> Decision:
    place = "self_attn" if name in ("q", "k", "v", "o") else "mlp"
    action: Any = "keep" if rank is None else "approximate" if rank else "remove"
    macs = out * into if rank is None else rank * (out + into)
    if place == "mlp" and width is not None:
        action, rank, macs = "narrow", width, width * min(out, into)
    module = f"model.layers.{layer}.{place}.{name}_proj"
    return Decision(module, action, rank or 0, macs, out, into, "test")


def plan(ranks: dict[str, int | None], layers: int = 2, width: int | None = None) -> Plan:
    """`width`: neurons of every MLP, whatever `ranks` says of its projections."""
    shapes = {
        "q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32),
        "gate": (64, 24), "up": (64, 24), "down": (24, 64),
    }  # fmt: skip
    decisions = tuple(
        decision(layer, name, ranks.get(name), width, *shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    )
    return Plan(0.5, "budgeted", "test", 8, decisions)


@pytest.mark.parametrize("width", [None, 40, 8])
@pytest.mark.parametrize(
    "ranks",
    [
        {"gate": 6, "up": 12, "down": 8},
        {"q": 8, "k": 4, "gate": 0, "up": 12, "down": 8},
        {},
        {"q": 0, "o": 0, "gate": 0, "up": 0, "down": 0, "k": 0, "v": 4},
        {name: 0 for name in ("q", "k", "v", "o", "gate", "up", "down")},
    ],
)
def test_a_stack_multiplies_exactly_what_the_plan_says(
    ranks: dict[str, int | None], width: int | None, tmp_path: Path
) -> None:
    import onnx_ir as ir

    chosen = plan(ranks, width=width)
    model = stack_model(chosen.decisions)
    weights = [v.const_value for v in model.graph.initializers.values()]
    assert sum(w.size for w in weights if len(w.shape) == 2) == chosen.macs
    factored = [layer_of(d.module) for d in chosen.decisions if d.action == "approximate"]
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    inputs = {(layer, shared.get(name, name)) for layer, name in factored}
    dense = sum(d.action in ("keep", "narrow") for d in chosen.decisions)
    matmuls = sum(node.op_type == "MatMul" for node in model.graph)
    assert matmuls == len(factored) + len(inputs) + dense
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    outputs = session.run(None, stack_inputs(session, 3))
    assert all(np.isfinite(o).all() and o.shape[0] == 3 for o in outputs)


@pytest.mark.parametrize("width", [None, 40])
def test_module_times_hold_every_stack_thread_and_token_count(width: int | None) -> None:
    calls = []
    ranks: dict[str, int | None] = {name: 8 for name in ("q", "o", "gate", "up", "down")}
    half = plan(ranks, width=width)
    times = time_modules(
        {"half": half},
        rounds=3, threads=(1,), token_counts=(1, 4), on_call=lambda: calls.append(1),
    ).to_json()  # fmt: skip
    assert times["layers"] == 2
    assert times["macs_fraction"] == {"dense": 1, "half": half.macs / half.dense_macs}
    places = [(r["stack"], r["threads"], r["tokens"]) for r in times["rows"]]
    assert places == [(s, 1, t) for t in (1, 4) for s in ("dense", "half")]
    assert all(r["speedup"] == 1 for r in times["rows"] if r["stack"] == "dense")
    assert len(calls) == 2 * 2 * (3 + 2)


def test_large_models_are_timed_on_evenly_spaced_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    large = plan({}, layers=9)
    assert timed_layers(large) == list(range(9))
    monkeypatch.setattr("evaluate.module_time.DENSE_BYTES_LIMIT", 4 * large.dense_macs // 3)
    assert timed_layers(large) == [0, 4, 8]
