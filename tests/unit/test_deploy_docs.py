"""docs/deploy.md: its commands run, its tables are the script's."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deploy import ceilings
from deploy.__main__ import COMMANDS, main
from scripts import measure_deploy
from tests.deploy_engines import Engines

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Arguments of every `python -m deploy` line in the page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line.partition("python -m deploy ")[2]) for line in lines]


def test_the_commands_of_the_page_run(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but `serve`, which test_server starts; with fewer tokens and repetitions."""
    Engines(tmp_path / "runs" / "demo", tiny_tokenizer).engine("fp32")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A boat"}\n')
    monkeypatch.chdir(tmp_path)
    for name, small in (("READ_BYTES", 2**20), ("MATMUL_SIZE", 64), ("REPEATS", 1)):
        monkeypatch.setattr(ceilings, name, small)
    found = commands()
    assert {argv[0] for argv in found} == set(COMMANDS)
    for argv in found:
        text = io.TextIOWrapper(io.BytesIO(b"Once upon a time"))
        monkeypatch.setattr(sys, "stdin", text)
        more = {"generate": ["--max-tokens", "4"], "bench": ["-r", "1", "-p", "8", "-n", "4"]}
        if argv[0] != "serve":
            assert main([*argv, *more.get(argv[0], [])]) == 0, (argv, capsys.readouterr().err)


def row(contender: str, directory: str | None, test: str, speed: float) -> dict[str, Any]:
    return {
        "contender": contender, "directory": directory, "test": test, "tokens_per_s": speed,
        "tokens_per_s_p5": speed, "tokens_per_s_p95": speed, "ceiling_fraction": 0.5,
    }  # fmt: skip


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    rows = []
    for name, directory, prefill, decode in (
        ("f25/int4", "a/int4", 4000.0, 300.0),
        ("dense/int4", "b/int4", 900.0, 190.0),
        ("llama.cpp", None, 500.0, 200.0),
    ):
        rows += [row(name, directory, "pp256", prefill), row(name, directory, "tg128", decode)]
    report = {
        "engines": {"student": ["a/int4"], "dense": ["b/int4"]},
        "bench": {
            "rows": rows,
            "machine": {"processor": "a CPU"},
            "ceilings": [{"threads": 2}],
        },
        "perplexity": {
            name: {"perplexity": 40.0, "tokens": 8176} for name in ("a/int4", "b/int4", "llama.cpp")
        },
        "text": "test.txt",
        "startup": {"engine": "engine-ort/int4-cpu", "import_s": 0.3, "first_token_s": 0.9},
        "load_1min": 0.1,
    }
    (tmp_path / "deploy.json").write_text(json.dumps(report))
    page = tmp_path / "deploy.md"
    page.write_text(PAGE, encoding="utf-8")
    measure_deploy.write_page(page, tmp_path)
    written = page.read_text(encoding="utf-8")
    assert "| student's prefill ÷ llama.cpp's | ≥ 6 | 8 | f25/int4 |" in written
    assert "| student's decode ÷ llama.cpp's | ≥ 2 | 1.5 | f25/int4 |" in written
    assert "| dense decode ÷ llama.cpp's | ≥ 1 | 0.95 | dense/int4 |" in written
    assert re.search(r"<!-- measured: server -->\nNot measured yet.\n<!-- end -->", written)
    assert measure_deploy.MARKED.sub("", written) == measure_deploy.MARKED.sub("", PAGE)
