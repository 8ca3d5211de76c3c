"""The command line of ``python -m evaluate``: one frozen dataclass, one field a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.artifact import UserError
from distill.flags import flag, parse_flags, positive, switch
from distill.flags import text as optional

PEERS = ("llama.cpp",)
QUICK = {"windows": 4, "queries": 12, "rounds": 3, "shots": ("10",), "decode_tokens": 6}


def _numbers(default: tuple[str, ...], help_text: str, low: int) -> Any:
    """Whole numbers, given as separate words or joined by commas."""
    return flag(
        default,
        help_text,
        lambda v: bool(v) and all(n.isdigit() and int(n) >= low for n in _split(v)),
        f"whole numbers from {low}, separated by spaces or commas",
    )


@dataclass(frozen=True)
class EvaluateArgs:
    """Everything that shapes a report. Units and ranges stand in each flag's help."""

    run: tuple[str, ...] = flag(
        (), "run folders to compare (default: the newest run)", all, "folders or their names"
    )
    text: str = flag(
        "heldout",
        "text for perplexity: heldout (what the runs kept apart), a .txt or .jsonl file, "
        "hub:NAME[:CONFIG][:SPLIT][:FIELD]",
        bool,
        "heldout, a file or a hub data set",
    )
    window: int = flag(512, "tokens of a window", lambda v: v >= 16, "16 or more")
    stride: int = flag(
        0, "tokens from one window to the next (0: the window, no overlap)", lambda v: v >= 0,
        "0 or more",
    )  # fmt: skip
    windows: int = positive(8, "most windows")
    probes: str | None = optional(
        None, "folder of JSON task files (default: the built-in tasks)", "a folder"
    )
    shots: tuple[str, ...] = _numbers(
        ("0", "1", "5", "10"), "worked examples before a query; the largest is the headline", 0
    )
    queries: int = positive(24, "queries a task")
    prompt_lengths: tuple[str, ...] = _numbers(("32", "256"), "prompt lengths timed, tokens", 1)
    batch_sizes: tuple[str, ...] = _numbers(("1", "4"), "batch sizes timed", 1)
    decode_tokens: int = positive(8, "tokens decoded in a timed call")
    rounds: int = positive(5, "timed rounds")
    threads: int = flag(
        0, "threads of every contender (0: all cores of this machine)", lambda v: v >= 0,
        "0 or more",
    )  # fmt: skip
    peer: tuple[str, ...] = flag(
        (), "outside runtimes to time on the same GGUF", lambda v: set(v) <= set(PEERS),
        " ".join(PEERS),
    )  # fmt: skip
    quick: bool = switch("fewer windows, queries and rounds: a look, not a measurement")
    quality_only: bool = switch("perplexity and probes only: no times, no memory")
    no_dense_engines: bool = switch("do not build engines of the dense original for comparison")
    out: str | None = optional(None, "where the report goes (default: RUN/report)", "a folder")
    seed: int = flag(0, "seed of the probes", lambda v: 0 <= v < 2**31, "0 to 2³¹ − 1")


def parse_evaluate(argv: Sequence[str]) -> EvaluateArgs:
    """Parse and validate; raises UserError that reports every wrong flag at once."""
    values = parse_flags(
        EvaluateArgs,
        argv,
        prog="python -m evaluate",
        description="Measure quality, behaviour, speed and size of runs, and write one report. "
        "python -m evaluate sweep trains a family of budgets first: see python -m evaluate sweep "
        "--help.",
    )
    if "quick" in values:
        values = {**QUICK, **values}
    args = EvaluateArgs(**values)
    args = replace(args, stride=args.stride or args.window)
    if args.stride > args.window:
        raise UserError(
            f"--stride {args.stride}: leaves text out between windows of {args.window}; allowed "
            f"is 1 to {args.window}; lower it or raise --window"
        )
    return args


def whole_numbers(words: Sequence[str]) -> tuple[int, ...]:
    """("1,4", "8") -> (1, 4, 8), rising and without repeats."""
    return tuple(sorted({int(n) for n in _split(words)}))


def _split(words: Sequence[str]) -> list[str]:
    return [n for word in words for n in word.split(",") if n]
