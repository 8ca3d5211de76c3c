"""Which engine a command means, which arguments it refuses, where its prompts come from."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import deploy.engines
import distill.runs
from deploy.args import Parser, number, parse, whole, whole_numbers
from deploy.engines import engine_name, engines_matching, engines_of, find_engine
from deploy.generate import add_arguments, sampling_settings
from deploy.prompts import read_batch, read_prompt
from distill.artifact import UserError
from distill.runs import find_run


def make_engine(run: Path, name: str, age_s: int = 0) -> Path:
    directory = run / name
    directory.mkdir(parents=True)
    file = "model.engine" if name.startswith("engine-trt") else "model.onnx"
    (directory / file).write_bytes(b"")
    (directory / "manifest.json").write_text("{}")
    os.utime(directory / "manifest.json", (1e9 - age_s, 1e9 - age_s))
    return directory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all runs, on a machine with a GPU."""
    monkeypatch.setattr(deploy.engines, "gpu_sm", lambda: "sm89")
    for module in (deploy.engines, distill.runs):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_fastest_kind_comes_first(runs: Path) -> None:
    names = (
        "onnx/plain-int4", "onnx/ort-int8", "onnx/ort-int4", "onnx/standard-int4",
        "engine-ort/fp32-cpu", "engine-ort/int8-cpu",
        "engine-ort/fp16-cuda", "engine-ort/int4-cpu", "engine-trt/fp16", "engine-trt/int8",
    )  # fmt: skip
    for name in names:
        make_engine(runs / "a", name)
    (runs / "a" / "engine-ort" / "unfinished").mkdir()
    found = [f"{path.parent.name}/{path.name}" for path in engines_of(runs / "a")]
    assert found == [
        "engine-trt/int8", "engine-trt/fp16", "engine-ort/fp16-cuda", "engine-ort/int4-cpu",
        "engine-ort/int8-cpu", "engine-ort/fp32-cpu", "onnx/ort-int4", "onnx/ort-int8",
        "onnx/standard-int4", "onnx/plain-int4",
    ]  # fmt: skip


def test_the_newest_run_with_an_engine(runs: Path) -> None:
    make_engine(runs / "old", "engine-ort/int4-cpu", age_s=100)
    wanted = make_engine(runs / "new", "engine-ort/int8-cpu", age_s=10)
    (runs / "newest" / "student").mkdir(parents=True)
    assert find_engine(None) == Path(runs / "new" / "engine-ort" / "int8-cpu")
    assert find_engine("new") == find_engine(str(runs / "new")) == wanted
    assert find_engine(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("engine-ort/int8-cpu", "engine-ort/int8-cpu"),
        ("int8-cpu", "engine-ort/int8-cpu"),
        ("int8", "engine-ort/int8-cpu"),
        ("onnx", "onnx/ort-int8"),
        ("ort-int8", "onnx/ort-int8"),
        ("int4/", "engine-ort/int4-cpu"),
    ],
)
def test_engines_by_name(runs: Path, engine: str, expected: str) -> None:
    for name in ("onnx/ort-int8", "engine-ort/int8-cpu", "engine-ort/int4-cpu"):
        make_engine(runs / "a", name)
    assert engine_name(find_engine("a", engine)) == expected


def test_a_build_kit_is_taken_only_where_nothing_runs_or_by_its_name(runs: Path) -> None:
    kit = make_engine(runs / "a", "engine-trt/int8")
    (kit / "model.engine").rename(kit / "model.onnx")
    assert find_engine("a") == find_engine("a", "int8") == kit
    engine = make_engine(runs / "a", "engine-ort/int8-cpu")
    assert find_engine("a") == find_engine("a", "int8") == engine
    assert find_engine("a", "engine-trt/int8") == find_engine("a", "engine-trt") == kit


def test_without_a_gpu_tensorrt_comes_last_but_before_kits(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be built ahead of time, on a machine that cannot run it."""
    engine = make_engine(runs / "a", "engine-trt/int8")
    kit = make_engine(runs / "a", "engine-trt/int8-sm87")
    (kit / "model.engine").rename(kit / "model.onnx")
    cpu = make_engine(runs / "a", "engine-ort/int8-cpu")
    assert engines_of(runs / "a") == engines_matching("a", "int8") == [engine, cpu, kit]
    monkeypatch.setattr(deploy.engines, "gpu_sm", lambda: None)
    assert engines_of(runs / "a") == engines_matching("a", "int8") == [cpu, engine, kit]
    assert find_engine("a", "engine-trt") == engine


def test_what_is_not_there_is_named(runs: Path) -> None:
    with pytest.raises(UserError, match="no folder below .* holds a finished engine"):
        find_engine(None)
    engine = make_engine(runs / "a", "engine-ort/int8-cpu")
    (runs / "empty").mkdir()
    for run, name, said in (
        ("b", None, "no such folder, .*runs with an engine: a;"),
        ("empty", None, "holds no finished engine"),
        ("a", "fp16", "it has engine-ort/int8-cpu; choose"),
        (str(engine), "int8", "is an engine itself"),
    ):
        with pytest.raises(UserError, match=said) as error:
            find_engine(run, name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("b", "no such folder, nor runs/b;"),
        ("group/b", "no such folder, nor runs/group/b;"),
        ("runs/b", "no such folder;"),
        ("/nowhere/b", "no such folder;"),
    ],
)
def test_each_place_that_was_looked_at_is_named_once(
    run: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for look in (find_engine, find_run):
        with pytest.raises(UserError) as error:
            look(run)
        assert f"--run {run}: {said}" in str(error.value)


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser(prog="prog", allow_abbrev=False)
    parser.add_argument("--count", type=whole(1, 9), default=1)
    parser.add_argument("--share", type=number(0, 1, above=True))
    parser.add_argument("--sizes", type=whole_numbers(1))
    parser.add_argument("--kind", choices=("a", "b"))
    parser.add_argument("words", nargs="*")
    return parse(parser, argv)


def test_good_arguments() -> None:
    args = parsed("one", "--count", "9", "two", "--share", "1", "--sizes", "1,2")
    assert (args.count, args.share, args.sizes, args.words) == (9, 1.0, (1, 2), ["one", "two"])


def test_every_wrong_argument_is_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        parsed("--count", "10", "--share", "0", "--sizes", "0,1", "--nonsense")
    for said in (
        "--nonsense: no such flag",
        "--count 10: allowed is a whole number from 1 to 9",
        "--share 0: allowed is a number above 0 to 1",
        "--sizes 0,1: allowed is whole numbers from 1",
        "see prog --help",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [("--count", "x"), ("--count", "1.5"), ("--share", "nan"), ("--share", "inf"), ("--sizes", ""),
     ("--kind", "c"), ("--count",), ("--share", "-1")],
)  # fmt: skip
def test_one_wrong_argument(argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="see prog --help"):
        parsed(*argv)


def settings_of(directory: Path, *argv: str) -> dict[str, object]:
    parser = Parser(prog="prog")
    add_arguments(parser)
    return vars(sampling_settings(parse(parser, ["x", *argv]), directory))


def test_sampling_flags_come_before_the_models_own(tmp_path: Path) -> None:
    assert settings_of(tmp_path)["temperature"] == 0
    assert settings_of(tmp_path, "--top-p", "0.9") == settings_of(
        tmp_path, "--top-p", "0.9", "--temperature", "1"
    )
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = settings_of(tmp_path, "--top-k", "5", "--seed", "7")
    assert [found[k] for k in ("temperature", "top_p", "top_k", "seed")] == [0.6, 0.8, 5, 7]
    assert settings_of(tmp_path, "--greedy")["temperature"] == 0
    with pytest.raises(UserError, match="exclude one another"):
        settings_of(tmp_path, "--greedy", "--temperature", "0.5")


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes, tty: bool = False) -> None:
    fake = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: tty)
    monkeypatch.setattr("sys.stdin", fake)


def test_prompts_of_the_command_line_and_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_prompt(["two", "words"]) == "two words"
    standard_input(monkeypatch, "é\nb\n".encode())
    assert read_prompt(["-"]) == "é\nb"
    standard_input(monkeypatch, b"from a pipe")
    assert read_prompt([]) == "from a pipe"
    for content, tty, said in (
        (b"", True, "no PROMPT"),
        (b"", False, "is empty"),
        (b"\xff", False, "byte 0"),
    ):
        standard_input(monkeypatch, content, tty)
        with pytest.raises(UserError, match=said):
            read_prompt([])


def test_batch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\n  two\n")
    assert read_batch(str(lines)) == ["one", "  two"]
    objects = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    rows = ['{"prompt": "one\u2028more"}', "", '"plain"', json.dumps({"messages": messages})]
    objects.write_text("\n".join(rows), encoding="utf-8")
    assert read_batch(str(objects)) == ["one\u2028more", "plain", messages]
    standard_input(monkeypatch, b'"x"\n')
    assert read_batch("-") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'"a"\n{"prompt": 3}', "line 2: has no prompt"),
        ("p.jsonl", b'"a"\n{"prompt"', "line 2: no JSON"),
        ("p.jsonl", b'{"messages": []}', "line 1: has no prompt"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.csv", b"a", r"needs a .txt file"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_wrong_batch_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_batch(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_help_states_what_every_number_may_be() -> None:
    parser = Parser(prog="python -m deploy x")
    parser.add_argument("--count", type=whole(1, 9), help="how many")
    parser.add_argument("--share", type=number(0, 1, above=True), help="50 %% of it")
    parser.add_argument("--sizes", type=whole_numbers(2), help="batches")
    parser.add_argument("--name", help="anything")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert "--count COUNT how many [a whole number from 1 to 9]" in lines
    assert "--share SHARE 50 % of it [a number above 0 to 1]" in lines
    assert "--sizes SIZES batches [whole numbers from 2, separated by commas]" in lines
    assert "--name NAME anything" in lines
