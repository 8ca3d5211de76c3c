"""The user's mistakes: exit status 2, one line that says what to do, and no student directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.args import parse_args
from distill.artifact import UserError
from distill.factors import store_bytes
from distill.rundir import require_resources
from distill.teacher import load_teacher
from tests.e2e.faults import Ended, Fault, assert_refused, broken, call, command, weights

Refused = Callable[..., Ended]
LINES = "".join(f"The boat {n} carries {n * 7} stones past the mill.\n\n" for n in range(400))


@pytest.fixture
def refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused("--budget", "2", words=("0 < F",))``: runs, checks the refusal and what is left."""

    def check(*flags: str, words: tuple[str, ...], source: Path | None = None) -> Ended:
        run = tmp_path / "run"
        ended = call(capsys, command(source or teacher, run, *flags))
        assert_refused(ended, *words)
        assert not (run / "student").exists()
        assert not run.exists() or [p.name for p in run.iterdir()] != [".lock"]
        return ended

    return check


@pytest.mark.parametrize("budget", ["0", "-0.1", "1.01", "nan", "inf", "half"])
def test_budgets_outside_0_to_1(budget: str, refused: Refused) -> None:
    ended = refused(f"--budget={budget}", words=("--budget", budget, "0 < F ≤ 1"))
    assert len(ended.err.splitlines()) == 1


def test_all_wrong_flags_are_reported_together(refused: Refused) -> None:
    flags = "--budget 0 --rank-multiple 7 --method magic --tokens -5 --data self a.txt".split()
    words = ("--budget 0", "--rank-multiple 7", "8 | 16 | 32 | 64", "--method magic", "budgeted")
    ended = refused(*flags, words=(*words, "--tokens -5", "--data self a.txt"))
    assert len(ended.err.splitlines()) == 1
    flags = "--batch-tokens 100 --tokens 10 --resume --overwrite".split()
    refused(*flags, words=("--batch-tokens 100", "--tokens 10", "--resume and --overwrite"))


def test_an_unknown_flag(refused: Refused) -> None:
    refused("--bugdet", "0.5", words=("--bugdet", "--help"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ("missing.txt", "No such file")),
        ("empty.txt", b"", ("empty.txt", "no text")),
        ("blank.txt", b" \n\n\t\n", ("blank.txt", "no text")),
        ("binary.txt", b"\x7fELF\x00\x01\x02" * 50, ("binary.txt", "binary")),
        ("latin.txt", b"one\ntwo\ncaf\xe9\n", ("latin.txt", "line 3", "UTF-8")),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', ("torn.jsonl", "line 2", "JSON")),
        ("other.jsonl", b'{"body": "a"}\n', ("other.jsonl", "line 1", '"text"')),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', ("half.jsonl line 2", "half a")),
        ("table.csv", b"a,b\n", ("table.csv", ".txt")),
        ("short.txt", b"word", ("too short",)),
    ],
)
def test_unusable_text(
    name: str, content: bytes | None, words: tuple[str, ...], refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused("--data", str(path), words=words)


def test_a_folder_given_as_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").mkdir()
    refused("--data", str(tmp_path / "texts.txt"), words=("texts.txt", "directory"))


def test_good_text_is_accepted(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin: what only looks like the files above is read."""
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(LINES)
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in LINES.split("\n\n")))
    argv = command(teacher, tmp_path / "run", "--data", str(text), str(rows), tokens="512")
    ended = call(capsys, argv)
    assert ended.status == 0, ended.err


def _other_architecture(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


def _torn_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def _lacking_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "architecture": (_other_architecture, ("gpt2", "llama", "qwen3", "gemma3_text")),
    "torn weights": (_torn_weights, ("cannot be read",)),
    "lacking weight": (_lacking_weight, ("up_proj",)),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("model.safetensors",)),
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json",)),
    "torn config": (lambda d: os.truncate(d / "config.json", 40), ("config.json", "truncated")),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ("tokenizer",)),
    "torn tokenizer": (lambda d: os.truncate(d / "tokenizer.json", 400), ("tokenizer",)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_teacher(fault: str, refused: Refused, damaged: Path) -> None:
    damage, words = BROKEN[fault]
    damage(damaged)
    refused(words=("damaged", *words), source=damaged)


def test_no_such_model(refused: Refused, tmp_path: Path) -> None:
    refused(words=("nowhere", "does not exist"), source=tmp_path / "nowhere")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(24))
    refused(words=("torn.gguf",), source=tmp_path / "torn.gguf")


def test_a_student_is_no_teacher(refused: Refused, whole: Callable[..., Path]) -> None:
    refused(words=("budgeted_llama", "--dense-copy"), source=whole() / "student")


def test_tokenizers_that_differ(refused: Refused, damaged: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(damaged)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(damaged)
    refused("--student", str(damaged), words=("tokenizer", "damaged", "<other>"))


def test_a_rank_multiple_that_fits_no_module(refused: Refused) -> None:
    words = ("--rank-multiple 64", "largest useful", "42")
    refused("--mlp", "pair", "--rank-multiple", "64", words=words)


def test_a_device_that_is_not_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("--device", "cuda", words=("--device cuda", "cpu"))


def test_longer_sequences_than_the_teacher_takes(refused: Refused) -> None:
    flags = "--seq-len 1024 --batch-tokens 1024 --tokens 4096"
    refused(*flags.split(), words=("--seq-len 1024", "512 tokens at most"))


def test_memory_of_the_stage_that_needs_most(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the default run has room for is too little for a long refit, for a dense residual, and
    least of all for factors of every rank beside one. Methods without a refit need none for it."""
    model = load_teacher(str(teacher), dtype=torch.float32).model
    small = ["--micro-batch", "1", "--statistics-memory-gib", "1e-6"]
    argv = command(teacher, tmp_path / "run", *small, refit_tokens="0")
    needs: list[int] = []

    def need(flags: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr("distill.rundir.require_memory", lambda n, what: needs.append(n))
            require_resources(parse_args([*argv, *flags.split()]), model, model)
        return needs[-1]

    assert need("") < need("--mlp pair --anneal 1e-6") < need("--allocation learned")
    assert need("") < need("--refit-tokens 10485760")
    assert need("--method svd") == need("--method svd --refit-tokens 10485760")
    monkeypatch.setattr("distill.resources.available_memory_bytes", lambda: need("") + 1)
    require_resources(parse_args(argv), model, model)
    with pytest.raises(UserError, match="this run needs .* GiB of memory"):
        require_resources(parse_args([*argv, "--mlp", "pair", "--anneal", "1e-6"]), model, model)


def test_disk_for_the_statistics_of_every_allocation(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned ones are factored as pairs first; what keeps every module is not factored."""
    model = load_teacher(str(teacher), dtype=torch.float32).model
    needs: dict[str, int] = {}
    for flags in ("", "--allocation learned", "--mlp pair", "--method svd", "--method lora"):
        argv = command(teacher, tmp_path / "run", *flags.split(), budget="0.9")
        with monkeypatch.context() as patch:
            note = lambda path, n, what, name=flags: needs.update({name: n})  # noqa: E731
            patch.setattr("distill.rundir.require_disk", note)
            require_resources(parse_args(argv), model, model)
    factors = {form: store_bytes(model, form) for form in ("narrow", "pair", "svd")}
    assert factors["narrow"] < factors["svd"] < factors["pair"]
    assert needs["--allocation learned"] - needs[""] == pytest.approx(factors["pair"], abs=1)
    rest = {needs[""] - factors["narrow"], needs["--mlp pair"] - factors["pair"]}
    rest |= {needs["--method svd"] - factors["svd"], needs["--method lora"]}
    assert len(rest) == 1 and min(rest) > 0


def test_too_little_memory(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.resources.available_memory_bytes", lambda: 2_000_000)
    refused(words=("memory", "GiB"))


def test_too_little_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=100_000)
    monkeypatch.setattr("distill.resources.shutil.disk_usage", lambda path: free)
    refused(words=("disk", "GiB", "--run"))


def test_a_file_where_the_run_folder_should_be(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        assert_refused(call(capsys, command(teacher, run)), str(run), "--run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_corrected_mistake_needs_no_other_folder(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    argv = command(teacher, run, "--data", str(tmp_path / "typo.txt"), tokens="512")
    assert_refused(call(capsys, argv), "typo.txt")
    assert call(capsys, command(teacher, run, tokens="512")).status == 0


def test_a_mistake_does_not_cost_the_finished_student(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Callable[..., Path]
) -> None:
    run = Path(shutil.copytree(whole(), tmp_path / "run"))
    argv = command(tmp_path / "nowhere", run, "--overwrite")
    assert_refused(call(capsys, argv), "nowhere")
    assert (run / "student" / "manifest.json").exists()


def test_a_finished_run_is_not_overwritten(
    teacher: Path, whole: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole() / "student" / "manifest.json").read_bytes()
    ended = call(capsys, command(teacher, whole()))
    assert_refused(ended, "finished student", "--overwrite", "--run")
    assert (whole() / "student" / "manifest.json").read_bytes() == before


def test_an_interrupted_run_wants_to_be_resumed_as_it_was(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fault = Fault("distill.train:_step", 4)
    assert broken(command(teacher, run, tokens="1024"), tmp_path / "err", fault) < 0
    again = call(capsys, command(teacher, run, tokens="1024"))
    assert_refused(again, "interrupted run", "--resume", "--overwrite")
    changed = call(capsys, ["--run", str(run), "--resume", "--budget", "0.5"])
    assert_refused(changed, "--budget 0.5", "0.25")
    (run / "checkpoint" / "optimizer.safetensors").write_bytes(b"torn")
    assert_refused(call(capsys, ["--run", str(run), "--resume"]))
    (run / "request.json").write_text('{"budget": 0.2')
    assert_refused(call(capsys, ["--run", str(run), "--resume"]), "request.json")
    assert not (run / "student").exists()


def test_nothing_to_resume(refused: Refused) -> None:
    refused("--resume", words=("--resume", "request.json", "does not exist"))


def test_nothing_is_left_of_a_run_that_could_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for run in (tmp_path / "new" / "deep" / "run", tmp_path / "mine"):
        assert_refused(call(capsys, command(tmp_path / "nosuch", run)), "does not exist")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_learning_rate_that_diverges(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(teacher, tmp_path / "run", "--learning-rate", "1e30", tokens="1024")
    assert_refused(call(capsys, argv), "loss became", "--learning-rate")
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("damaged", ["factors-*/layer-1.safetensors", "teacher-*/rows.json"])
def test_a_damaged_cache_is_made_anew(
    damaged: str,
    teacher: Path,
    whole: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that --overwrite never gives a student away for nothing."""
    shutil.copytree(whole().parent / "cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob(damaged)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    ended = call(capsys, command(teacher, tmp_path / "run"))
    assert ended.status == 0
    assert ("layer-1.safetensors" in ended.err and "made anew" in ended.err) == (
        file.suffix == ".safetensors"
    )
    assert weights(tmp_path / "run") == weights(whole())
    assert file.stat().st_size == size
