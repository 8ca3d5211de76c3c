"""Flags of evaluate and of its sweep: defaults, ranges, and who gets what."""

from __future__ import annotations

import pytest

from distill.artifact import UserError
from evaluate.args import parse_evaluate, whole_numbers
from evaluate.sweep.args import parse_sweep


def test_defaults_stand_for_a_whole_report() -> None:
    args = parse_evaluate([])
    assert args.run == () and args.text == "heldout" and not args.quick
    assert whole_numbers(args.shots) == (0, 1, 5, 10)
    assert args.stride == args.window == 512


def test_quick_asks_less_and_leaves_given_flags_alone() -> None:
    quick = parse_evaluate(["--quick", "--windows", "7"])
    assert quick.quick and quick.windows == 7
    assert quick.queries < parse_evaluate([]).queries and quick.rounds < parse_evaluate([]).rounds


def test_every_wrong_flag_is_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_evaluate(["--windows", "0", "--shots", "one", "--peer", "vllm", "--fast"])
    message = str(caught.value)
    for part in ("--windows 0", "--shots one", "--peer vllm", "--fast", "llama.cpp"):
        assert part in message
    assert "\n" not in message


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(UserError, match="leaves text out"):
        parse_evaluate(["--window", "64", "--stride", "65"])


def test_numbers_may_be_joined_or_apart() -> None:
    assert whole_numbers(("4,1", "8", "1")) == (1, 4, 8)


def test_a_sweep_sends_every_flag_to_the_command_that_has_it() -> None:
    args = parse_sweep(
        ["--budgets", "0.25,1,0.5", "--tokens", "4096", "--data", "a.txt", "b.txt", "--windows",
         "4", "--baselines", "svd", "--run", "runs/x", "--text", "c.txt", "--seed", "3",
         "--precision", "int8", "int4"]
    )  # fmt: skip
    assert args.budgets == (1, 0.5, 0.25) and args.baselines == ("svd",)
    assert args.distil_flags == ("--tokens", "4096", "--data", "a.txt", "b.txt", "--seed", "3")
    assert args.evaluate_flags == ("--windows", "4", "--text", "c.txt")
    assert args.distil.tokens == 4096 and args.run == "runs/x"
    assert args.precision == ("int8", "int4")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--budgets", "0.5,2"], "--budgets 0.5,2"),
        (["--budgets", "half"], "--budgets half"),
        (["--budget", "0.5"], "--budgets"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--windows", "none"], "--windows none"),
        (["--nonsense"], "--nonsense"),
        (["--baselines", "qat"], "--baselines qat"),
    ],
)
def test_a_sweep_refuses_what_any_of_its_commands_would(flags: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_sweep(flags)
    assert part in str(caught.value)
