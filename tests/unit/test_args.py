"""Every flag's default, range and message; contradictions; and resuming a recorded request."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from distill.args import (
    ALLOCATIONS,
    METHODS,
    RANK_MULTIPLES,
    RUN_CONTROL,
    DistilArgs,
    parse_args,
    request_json,
)
from distill.artifact import UserError

BAD = [
    ("--budget", "0"), ("--budget", "1.01"), ("--budget", "-0.2"), ("--budget", "nan"),
    ("--budget", "quarter"), ("--teacher", ""), ("--student", ""), ("--method", "magic"),
    ("--allocation", "random"), ("--run", ""), ("--data", ""), ("--tokens", "0"),
    ("--tokens", "1.5"), ("--seq-len", "8"), ("--seq-len", "40000"), ("--fewshot-share", "1"),
    ("--fewshot-share", "-0.1"), ("--heldout-share", "0"), ("--heldout-share", "0.95"),
    ("--statistics-tokens", "0"), ("--statistics-memory-gib", "0"),
    ("--statistics-memory-gib", "inf"), ("--refit-tokens", "-1"),
    ("--rank-multiple", "24"), ("--lora-rank", "0"),
    ("--mlp", "interpolative"), ("--optimizer", "sgd"),
    ("--learning-rate", "0"), ("--learning-rate", "inf"),
    ("--allocation-rate", "-1"), ("--anneal", "1"), ("--hidden-weight", "-1"),
    ("--answer-weight", "0"), ("--batch-tokens", "0"), ("--micro-batch", "0"),
    ("--checkpoint-steps", "0"), ("--teacher-pass", "memory"), ("--cache-gib", "0"),
    ("--dtype", "float16"), ("--device", "tpu"), ("--seed", "-1"), ("--seed", "2147483648"),
    ("--revision", ""),
]  # fmt: skip
GOOD = [
    ("--budget", "1", 1.0), ("--budget", "0.01", 0.01), ("--method", "svd", "svd"),
    ("--allocation", "spectral+learned", "spectral+learned"), ("--rank-multiple", "64", 64),
    ("--fewshot-share", "0", 0.0), ("--hidden-weight", "0", 0.0), ("--seed", "7", 7),
    ("--student", "a/b", "a/b"), ("--dtype", "bfloat16", "bfloat16"), ("--mlp", "pair", "pair"),
]  # fmt: skip


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "given",
    ["--method lora", "--allocation learned", "--anneal 0.5", "--budget 1", "--teacher-pass disk"],
)
def test_a_sharded_teacher_excludes_what_copies_it(given: str) -> None:
    said = refusal("--shard-teacher", *given.split())
    assert f"--shard-teacher and {given} exclude one another" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--plan-only --allocation learned", "--allocation learned has no plan before it has"),
        ("--anneal 0.5 --refit-tokens 1024", "there is no refit with --anneal"),
        ("--anneal 0.5", "--anneal 0.5: the neurons of a narrowed MLP are cut at once"),
        ("--anneal 0.5 --mlp narrow", "use --mlp pair or drop --anneal"),
        ("--tokens 10240 --fewshot-share 0.999", "none of the 20 sequences to text"),
    ],
)
def test_flags_that_would_be_without_effect_or_text_are_refused(flags: str, said: str) -> None:
    assert said in refusal(*flags.split())


@pytest.mark.parametrize("flags", ["--mlp pair", "--method svd", "--method svd --mlp narrow"])
def test_annealing_goes_with_pairs(flags: str) -> None:
    args = parse_args(["--anneal", "0.5", *flags.split()])
    assert args.anneal == 0.5
    assert parse_args([]).mlp == "narrow"


def test_the_refit_defaults_to_the_training_length_up_to_a_bound() -> None:
    tokens = {n: parse_args(["--tokens", str(n)]).refit_sequences * 512 for n in (20480, 10**6)}
    assert tokens == {20480: 20480, 10**6: 102400}
    assert parse_args(["--refit-tokens", "204800"]).refit_sequences == 400


def test_defaults_need_no_flag_and_satisfy_their_own_checks() -> None:
    args = parse_args([])
    assert args == DistilArgs(run="runs/smollm2-135m-b25")
    assert (args.budget, args.method, args.allocation, args.rank_multiple) == (
        0.25, "budgeted", "spectral", 32
    )  # fmt: skip
    for flag in fields(DistilArgs):
        assert flag.metadata["check"](flag.default), flag.name
    assert args.batch_tokens % args.seq_len == 0 and args.tokens >= args.batch_tokens


@pytest.mark.parametrize(("flag", "value"), BAD)
def test_a_bad_value_is_named_with_what_is_allowed(flag: str, value: str) -> None:
    message = refusal(f"{flag}={value}" if value.startswith("-") else flag, *(
        [] if value.startswith("-") else [value]
    ))  # fmt: skip
    by_name = {f.name: f for f in fields(DistilArgs)}
    allowed = by_name[flag[2:].replace("-", "_")].metadata["allowed"]
    assert f"{flag} {value}: allowed is {allowed}" in message
    assert "--help" in message


def test_every_flag_with_a_value_has_a_bad_one_above() -> None:
    tried = {flag[2:].replace("-", "_") for flag, _ in BAD}
    assert tried == {f.name for f in fields(DistilArgs) if f.default is not False}


def test_all_wrong_flags_are_reported_at_once() -> None:
    message = refusal(
        "--budget", "3", "--tokens", "many", "--seed", "5", "--dtype", "int4", "--bogus"
    )
    for part in ("--budget 3", "--tokens many", "--dtype int4", "--bogus"):
        assert part in message
    assert "--seed" not in message


def test_all_contradictions_are_reported_at_once() -> None:
    message = refusal(
        "--batch-tokens", "1000", "--tokens", "600", "--seq-len", "512", "--resume", "--overwrite"
    )
    for part in ("--batch-tokens 1000", "use 512", "--tokens 600", "--resume and --overwrite"):
        assert part in message
    assert "use 128" in refusal("--batch-tokens", "100", "--seq-len", "128")


@pytest.mark.parametrize(("flag", "value", "expected"), GOOD)
def test_a_good_value_arrives(flag: str, value: str, expected: object) -> None:
    assert getattr(parse_args([flag, value]), flag[2:].replace("-", "_")) == expected


@pytest.mark.parametrize("argv", [["--budge", "0.5"], ["0.5"], ["--tokens"], ["--resume=yes"]])
def test_what_is_no_flag_is_refused(argv: list[str]) -> None:
    assert "--help" in refusal(*argv)


def test_self_written_text_stands_alone() -> None:
    assert "--data self a.txt: allowed is" in refusal("--data", "self", "a.txt")
    assert parse_args(["--data", "a.txt", "hub:x"]).data == ("a.txt", "hub:x")


def test_switches_are_off_unless_given() -> None:
    switches = [f.name for f in fields(DistilArgs) if f.default is False]
    assert "plan_only" in switches and "trust_remote_code" in switches
    for name in set(switches) - {"resume"}:
        given = parse_args(["--" + name.replace("_", "-")])
        assert [s for s in switches if getattr(given, s)] == [name]


def test_the_run_folder_follows_from_model_budget_and_method() -> None:
    names = {
        ("--budget", "0.5"): "runs/smollm2-135m-b50",
        ("--budget", "0.05"): "runs/smollm2-135m-b05",
        ("--budget", "1"): "runs/smollm2-135m-b100",
        ("--method", "lora"): "runs/smollm2-135m-lora",
        ("--method", "svd"): "runs/smollm2-135m-b25-svd",
        ("--teacher", "/models/Big.GGUF"): "runs/big-b25",
        ("--student", "org/Small"): "runs/small-b25",
        ("--run", "elsewhere"): "elsewhere",
    }
    for argv, expected in names.items():
        assert str(parse_args(argv).run_directory) == expected


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in fields(DistilArgs):
        assert "--" + flag.name.replace("_", "-") in text
    for choice in (*METHODS, *ALLOCATIONS, *map(str, RANK_MULTIPLES), "default 0.25"):
        assert choice in text


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Path, DistilArgs]:
    """A run folder with the request of a run that was started with a few flags."""
    argv = ["--run", str(tmp_path), "--budget", "0.5", "--data", "a.txt", "--overwrite"]
    args = parse_args(argv)
    (tmp_path / "request.json").write_text(json.dumps(request_json(args)))
    return tmp_path, args


def test_resume_restores_the_recorded_arguments(interrupted: tuple[Path, DistilArgs]) -> None:
    folder, before = interrupted
    resumed = parse_args(["--resume", "--run", str(folder)])
    assert resumed == replace(before, resume=True, overwrite=False)
    assert not set(request_json(before)) & set(RUN_CONTROL)
    again = parse_args(["--resume", "--run", str(folder), "--budget", "0.5"])
    assert again == resumed


def test_resume_refuses_another_value_of_a_recorded_flag(
    interrupted: tuple[Path, DistilArgs],
) -> None:
    folder, _ = interrupted
    message = refusal("--resume", "--run", str(folder), "--budget", "0.25")
    assert "--budget 0.25" in message and "0.5" in message
    assert "--data" in refusal("--resume", "--run", str(folder), "--data", "b.txt")


def test_resume_needs_an_intact_request(interrupted: tuple[Path, DistilArgs]) -> None:
    folder, _ = interrupted
    path = folder / "request.json"
    whole = path.read_text()
    for broken in (whole[:40], "[]", "{}", whole.replace('"budget"', '"bugdet"')):
        path.write_text(broken)
        assert "request.json" in refusal("--resume", "--run", str(folder))
    path.unlink()
    assert "interrupted run" in refusal("--resume", "--run", str(folder))
