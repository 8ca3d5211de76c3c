"""The command line of ``python -m distill``: one frozen dataclass, one field a flag."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distill.artifact import UserError, read_json

RANK_MULTIPLES = (8, 16, 32, 64)
METHODS = ("budgeted", "lora", "svd")
ALLOCATIONS = ("spectral", "learned", "spectral+learned", "uniform")
OPTIMIZERS = ("muon", "adamw")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
TEACHER_PASSES = ("auto", "disk", "live")


def _flag(default: Any, text: str, check: Callable[[Any], bool], allowed: str) -> Any:
    return field(default=default, metadata={"help": text, "check": check, "allowed": allowed})


def _choice(default: str, text: str, choices: Sequence[str]) -> Any:
    return _flag(default, text, lambda v: v in choices, " | ".join(choices))


def _fraction(default: float, text: str) -> Any:
    return _flag(default, text, lambda v: 0 <= v < 1, "0 ≤ value < 1")


def _positive(default: float, text: str) -> Any:
    return _flag(default, text, lambda v: v > 0, "a number above 0")


def _switch(text: str) -> Any:
    return _flag(False, text, lambda v: isinstance(v, bool), "given or not")


def _text(default: str | None, text: str, allowed: str) -> Any:
    return _flag(default, text, lambda v: v is None or bool(v), allowed)


MODEL_SOURCES = "smollm2-135m | a local directory | a .gguf file | a hub id"


@dataclass(frozen=True)
class DistilArgs:
    """Everything that shapes a run. Units and ranges stand in each flag's help."""

    budget: float = _flag(
        0.25,
        "fraction F of the target modules' dense MACs that the student may spend",
        lambda v: 0 < v <= 1,
        "0 < F ≤ 1",
    )
    teacher: str = _text("smollm2-135m", "model to imitate", MODEL_SOURCES)
    student: str | None = _text(
        None, "model that the student starts from (default: the teacher)", MODEL_SOURCES
    )
    method: str = _choice("budgeted", "budgeted LoRA, or a baseline", METHODS)
    allocation: str = _choice("spectral", "what decides ranks, removals and keeps", ALLOCATIONS)
    run: str | None = _text(None, "run folder (default: runs/MODEL-bNN)", "a folder")
    resume: bool = _switch("go on with an interrupted run, with its own arguments")
    overwrite: bool = _switch("replace the student of a finished run")
    plan_only: bool = _switch("stop after plan.json and its table")
    dense_copy: bool = _switch("also write the equal dense checkpoint of the plain architecture")
    data: tuple[str, ...] = _flag(
        ("self",),
        "training text: self (written by the teacher), .txt or .jsonl files, "
        "hub:NAME[:CONFIG][:SPLIT][:FIELD]",
        lambda v: all(v) and ("self" not in v or len(v) == 1),
        "self alone, or one or more files and hub data sets",
    )
    tokens: int = _positive(61440, "training length in tokens, few-shot sequences included")
    seq_len: int = _flag(512, "tokens per sequence", lambda v: 16 <= v <= 32768, "16 to 32768")
    fewshot_share: float = _fraction(
        0.5, "share of the sequences that are synthetic few-shot lists"
    )
    heldout_share: float = _flag(
        0.1, "share of the text kept for evaluation, by document", lambda v: 0 < v < 0.9, "0 to 0.9"
    )
    statistics_tokens: int = _positive(16384, "calibration tokens for S and G")
    correction_tokens: int = _flag(
        8192, "calibration tokens of the input correction (0: none)", lambda v: v >= 0, "0 or more"
    )
    statistics_memory_gib: float = _positive(
        8.0, "most memory for S and G at once, GiB; less means more passes"
    )
    rank_multiple: int = _flag(
        32, "ranks are multiples of this", lambda v: v in RANK_MULTIPLES, "8 | 16 | 32 | 64"
    )
    lora_rank: int = _positive(16, "rank of the adapter that trains a kept module")
    optimizer: str = _choice("muon", "Muon on matrices (Adam on the rest), or AdamW", OPTIMIZERS)
    learning_rate: float = _positive(5e-4, "peak of the cosine schedule")
    allocation_rate: float = _positive(0.03, "learning rate of d and g")
    anneal: float = _fraction(
        0.0, "share of the steps over which the dense residual fades (0: cut at once)"
    )
    hidden_weight: float = _flag(
        4.0, "weight of the hidden-state term", lambda v: v >= 0, "0 or more"
    )
    answer_weight: float = _positive(1.0, "weight of few-shot answers, 1 being plain text")
    batch_tokens: int = _positive(1024, "tokens per optimiser step, over all processes")
    micro_batch: int = _positive(2, "sequences that one process holds at once")
    gradient_checkpointing: bool = _switch("recompute activations to save memory")
    checkpoint_steps: int = _positive(25, "steps between checkpoints")
    teacher_pass: str = _choice(
        "auto", "teacher outputs from disk (once for all budgets) or live", TEACHER_PASSES
    )
    cache_gib: float = _positive(20.0, "most disk for teacher outputs, GiB; above it they are live")
    dtype: str = _choice(
        "auto", "compute precision; auto takes the faster matmul of this machine", DTYPES
    )
    device: str = _choice("auto", "where to train", DEVICES)
    seed: int = _flag(0, "seed of everything random", lambda v: 0 <= v < 2**31, "0 to 2³¹ − 1")
    revision: str | None = _text(None, "branch, tag or commit of a hub model", "a revision")
    trust_remote_code: bool = _switch("run code that comes with the teacher")

    def with_default_run(self) -> DistilArgs:
        """The same arguments with ``run`` filled in: runs/MODEL-bNN[-METHOD]."""
        if self.run is not None:
            return self
        model = Path(self.student or self.teacher).name.lower().removesuffix(".gguf") or "model"
        suffix = "" if self.method == "budgeted" else f"-{self.method}"
        budget = "" if self.method == "lora" else f"-b{round(100 * self.budget):02d}"
        return replace(self, run=f"runs/{model}{budget}{suffix}")

    @property
    def run_directory(self) -> Path:
        return Path(self.with_default_run().run or "")


RUN_CONTROL = ("run", "resume", "overwrite", "plan_only")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see python -m distill --help")


def parse_args(argv: Sequence[str]) -> DistilArgs:
    """Parse and validate; raises UserError that reports every wrong flag at once."""
    parser = _Parser(
        prog="python -m distill",
        description="Distil a causal language model into a student that keeps a compute budget.",
        allow_abbrev=False,
    )
    for flag in fields(DistilArgs):
        _add(parser, flag)
    parsed, unknown = parser.parse_known_args(list(argv))
    given = vars(parsed)
    problems = [f"{' '.join(unknown)}: no such flag"] if unknown else []
    values = {}
    for flag in fields(DistilArgs):
        if flag.name not in given:
            continue
        try:
            values[flag.name] = _converted(flag, given[flag.name])
        except ValueError:
            problems.append(_problem(flag, given[flag.name]))
            continue
        if not flag.metadata["check"](values[flag.name]):
            problems.append(_problem(flag, given[flag.name]))
    if problems:
        raise UserError("; ".join(problems) + "; see python -m distill --help")
    args = DistilArgs(**values).with_default_run()
    problems = _contradictions(args)
    if problems:
        raise UserError("; ".join(problems))
    return _resumed(args, values) if args.resume else args


def _contradictions(args: DistilArgs) -> list[str]:
    problems = []
    if args.batch_tokens % args.seq_len:
        problems.append(
            f"--batch-tokens {args.batch_tokens}: must be a multiple of --seq-len {args.seq_len}; "
            f"use {max(1, args.batch_tokens // args.seq_len) * args.seq_len}"
        )
    if args.tokens < args.batch_tokens:
        problems.append(
            f"--tokens {args.tokens}: less than one step of {args.batch_tokens}; "
            "raise it or lower --batch-tokens"
        )
    if args.resume and args.overwrite:
        problems.append("--resume and --overwrite exclude one another; give one of them")
    return problems


def _resumed(args: DistilArgs, given: dict[str, Any]) -> DistilArgs:
    """The arguments of the interrupted run; a flag that differs from them is an error."""
    path = args.run_directory / "request.json"
    if not path.exists():
        raise UserError(
            f"--resume: {path} does not exist; needs an interrupted run; "
            "name it with --run DIR or start without --resume"
        )
    recorded = read_json(path)
    try:
        recorded["data"] = tuple(recorded["data"])
        before = DistilArgs(**recorded)
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a run's request ({error}); start with --overwrite"
        ) from None
    for name, value in given.items():
        if name not in RUN_CONTROL and value != getattr(before, name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run in {args.run_directory} was started "
                f"with {getattr(before, name)}; resume without this flag or use another --run"
            )
    return replace(before, resume=True, run=args.run, plan_only=args.plan_only)


def request_json(args: DistilArgs) -> dict[str, Any]:
    """What request.json records: all that shapes the result, none of what steers this call."""
    values = {k: v for k, v in asdict(args).items() if k not in RUN_CONTROL}
    return json.loads(json.dumps(values))


def _add(parser: argparse.ArgumentParser, flag: Field[Any]) -> None:
    name = "--" + flag.name.replace("_", "-")
    if flag.default is MISSING:
        raise TypeError(flag.name)
    if flag.default is False:
        parser.add_argument(
            name, action="store_true", default=argparse.SUPPRESS, help=flag.metadata["help"]
        )
        return
    shown = " ".join(flag.default) if isinstance(flag.default, tuple) else flag.default
    default = "" if shown is None else f"; default {shown}"
    text = f"{flag.metadata['help']} ({flag.metadata['allowed']}{default})".replace("%", "%%")
    many: dict[str, Any] = {"nargs": "+"} if isinstance(flag.default, tuple) else {}
    metavar = flag.name.rpartition("_")[2].upper()
    parser.add_argument(name, default=argparse.SUPPRESS, help=text, metavar=metavar, **many)


def _converted(flag: Field[Any], value: Any) -> Any:
    if isinstance(flag.default, bool):
        return value
    if isinstance(flag.default, tuple):
        return tuple(value)
    if isinstance(flag.default, int):
        return int(value)
    if isinstance(flag.default, float):
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    return value


def _problem(flag: Field[Any], value: Any) -> str:
    received = " ".join(value) if isinstance(value, list) else value
    return f"--{flag.name.replace('_', '-')} {received}: allowed is {flag.metadata['allowed']}"
