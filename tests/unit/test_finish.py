"""What a run says of its own speed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from distill.finish import training_figures
from distill.hardware import Compute, rate_by_now

FLOPS_PER_S = 1e8
"""Of the logged steps: any machine's matmul is faster."""


@pytest.mark.parametrize("at_start", [1e3, 1e18])
def test_a_disturbed_first_measurement_does_not_flatter(at_start: float, tmp_path: Path) -> None:
    lines = [
        {"step": n, "tokens": 64 * n, "tokens_per_s": 5.0 + n, "flops_per_s": FLOPS_PER_S * n}
        for n in (1, 2, 3)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compute = Compute(torch.device("cpu"), torch.float32, at_start)
    run: Any = cast(Any, SimpleNamespace(directory=tmp_path, compute=compute))
    figures = training_figures(run)
    assert (figures["tokens"], figures["tokens_per_s"]) == (192, 7.0)
    assert figures["matmul_flops_per_s"] == rate_by_now(compute) >= at_start
    assert figures["utilisation"] == 2 * FLOPS_PER_S / figures["matmul_flops_per_s"] < 1
