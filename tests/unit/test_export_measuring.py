"""What the measuring of exports adds to a plain timing: pinned threads and the cost of a matmul."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from scripts.export_page import overhead, trusted
from scripts.thread_pins import ThreadPins

DENSE_MACS = 1e8


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_get_cores_of_their_own() -> None:
    before, stop = os.sched_getaffinity(0), threading.Event()
    with ThreadPins() as pins:
        worker = threading.Thread(target=stop.wait)
        worker.start()
        pins.pin()
        first, second = os.sched_getaffinity(0), os.sched_getaffinity(worker.native_id or 0)
        assert len(first) == len(second) == 1 and first != second
        stop.set()
        worker.join()
    assert os.sched_getaffinity(0) == before


def report(seconds_of: Any) -> dict[str, Any]:
    fractions = {"dense": 1.0, "half": 0.5, "quarter": 0.25}
    nodes = {"dense": 10, "half": 16, "quarter": 20}
    rows = [
        {
            "stack": name,
            "threads": 2,
            "tokens": 32,
            "median_ms": 1e3 * seconds_of(fraction, nodes[name]),
        }
        for name, fraction in fractions.items()
    ]
    runs = {name: {"fp32": {"matmul_nodes": count}} for name, count in nodes.items()}
    modules = {"macs_fraction": fractions, "rows": rows}
    return {"rest_s": 0.05, "modules": modules, "runs": runs, "dense_macs": DENSE_MACS, "calls": []}


def test_the_cost_of_a_matmul_is_found_again() -> None:
    """2 · 32 · 1e8 operations at 200 GFLOP/s and 25 µs for every matmul."""

    def seconds(fraction: float, nodes: int) -> float:
        return 2 * 32 * DENSE_MACS * fraction / 200e9 + nodes * 25e-6

    line = overhead(report(seconds))[-1]
    assert "| 200 GFLOP/s | 25.0 |" in line and line.endswith("| 0% |")


def test_rows_timed_beside_spinning_threads_are_left_out() -> None:
    found = report(lambda fraction, nodes: fraction)
    assert len(trusted(found)["modules"]["rows"]) == 3
    del found["rest_s"]
    assert trusted(found)["modules"]["rows"] == []
