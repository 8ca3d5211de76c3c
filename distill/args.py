"""The command line of ``python -m distill``: one frozen dataclass, one field a flag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distill.artifact import UserError, read_json
from distill.flags import choice, flag, fraction, parse_flags, positive, switch, text

RANK_MULTIPLES = (8, 16, 32, 64)
METHODS = ("budgeted", "lora", "svd")
MLPS = ("narrow", "pair")
ALLOCATIONS = ("spectral", "learned", "spectral+learned", "uniform")
OPTIMIZERS = ("muon", "adamw")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
TEACHER_PASSES = ("auto", "disk", "live")
MOST_REFIT_TOKENS = 102400

MODEL_SOURCES = "smollm2-135m | a local directory | a .gguf file | a hub id"


@dataclass(frozen=True)
class DistilArgs:
    """Everything that shapes a run. Units and ranges stand in each flag's help."""

    budget: float = flag(
        0.25,
        "fraction F of the target modules' dense MACs that the student may spend",
        lambda v: 0 < v <= 1,
        "0 < F ≤ 1",
    )
    teacher: str = text("smollm2-135m", "model to imitate", MODEL_SOURCES)
    student: str | None = text(
        None, "model that the student starts from (default: the teacher)", MODEL_SOURCES
    )
    method: str = choice("budgeted", "budgeted LoRA, or a baseline", METHODS)
    allocation: str = choice(
        "spectral",
        "what decides ranks, neurons, removals and keeps of --method budgeted: one knapsack on "
        "estimated losses; gates that learn for the first 40 % of the steps; the same, begun at "
        "the knapsack's plan; or the same share everywhere",
        ALLOCATIONS,
    )
    mlp: str = choice(
        "narrow",
        "what becomes of an MLP that is neither kept nor removed: fewer neurons, each whole, or a "
        "factored pair for each projection (of --method budgeted; learned allocations learn with "
        "the cost of pairs)",
        MLPS,
    )
    run: str | None = text(None, "run folder (default: runs/MODEL-bNN[-METHOD])", "a folder")
    resume: bool = switch("go on with the interrupted run in --run, with its own arguments")
    overwrite: bool = switch("replace the student of a finished run")
    plan_only: bool = switch("stop after plan.json and its table")
    dense_copy: bool = switch("also write the equal dense checkpoint of the plain architecture")
    data: tuple[str, ...] = flag(
        ("self",),
        "training text: self (written by the teacher), .txt or .jsonl files, "
        "hub:NAME[:CONFIG][:SPLIT][:FIELD]",
        lambda v: all(v) and ("self" not in v or len(v) == 1),
        "self alone, or one or more files and hub data sets",
    )
    tokens: int = positive(61440, "training length in tokens, few-shot sequences included")
    seq_len: int = flag(512, "tokens per sequence", lambda v: 16 <= v <= 32768, "16 to 32768")
    fewshot_share: float = fraction(0.5, "share of the sequences that are synthetic few-shot lists")
    heldout_share: float = flag(
        0.1,
        "share of the text kept for evaluation, by document",
        lambda v: 0 < v < 0.9,
        "0 < value < 0.9",
    )
    statistics_tokens: int = positive(
        16384,
        "tokens of which second moments of inputs and output gradients are taken, the first of "
        "the training text",
    )
    refit_tokens: int | None = flag(
        None,
        "tokens of the closed-form refit before training (of --method budgeted, without --anneal, "
        "where the student starts from the teacher)",
        lambda v: v is None or v >= 0,
        f"0 (none) or more; default: as many as --tokens, {MOST_REFIT_TOKENS:,} at most",
        convert=int,
    )
    statistics_memory_gib: float = positive(
        8.0, "most memory for these second moments at once, GiB; less means more passes"
    )
    rank_multiple: int = flag(
        32,
        "ranks, and neurons of narrowed MLPs, are multiples of this (ONNX Runtime in int8 or int4 "
        "needs multiples of 32)",
        lambda v: v in RANK_MULTIPLES,
        "8 | 16 | 32 | 64",
    )
    lora_rank: int = positive(
        32, "rank of the adapter that trains a kept or narrowed module, and of --method lora"
    )
    optimizer: str = choice("muon", "Muon on matrices (Adam on the rest), or AdamW", OPTIMIZERS)
    learning_rate: float = positive(5e-4, "peak of the cosine schedule")
    allocation_rate: float = positive(0.03, "learning rate of the gates of learned allocations")
    anneal: float = fraction(
        0.0,
        "share of the steps after the plan in which the dense residual fades, with --mlp pair or "
        "--method svd (0: it is cut at once; --method budgeted then refits what is left)",
    )
    hidden_weight: float = flag(
        0.0,
        "weight of the hidden-state term; 0 keeps only the teacher's last block in the cache",
        lambda v: v >= 0,
        "0 or more",
    )
    answer_weight: float = positive(
        1.0,
        "weight of few-shot answers in statistics, refit and loss (plain text: 1); above 1 costs "
        "perplexity, and gained few-shot accuracy only at F = 0.5 with --mlp pair",
    )
    batch_tokens: int = positive(1024, "tokens per optimiser step, over all processes")
    micro_batch: int = positive(2, "sequences that one process holds at once")
    gradient_checkpointing: bool = switch("recompute activations to save memory")
    checkpoint_steps: int = positive(25, "steps between checkpoints")
    teacher_pass: str = choice(
        "auto", "teacher outputs from disk (once for all budgets) or live", TEACHER_PASSES
    )
    shard_teacher: bool = switch("spread the teacher's layers over the processes (FSDP)")
    cache_gib: float = positive(
        20.0, "most disk for teacher outputs, GiB; above it --teacher-pass auto computes them live"
    )
    dtype: str = choice(
        "auto", "compute precision; auto takes the faster matmul of this machine", DTYPES
    )
    device: str = choice("auto", "where to train", DEVICES)
    seed: int = flag(0, "seed of everything random", lambda v: 0 <= v < 2**31, "0 to 2³¹ − 1")
    revision: str | None = text(None, "branch, tag or commit of a hub model", "a revision")
    trust_remote_code: bool = switch("run code that comes with the teacher")

    def with_default_run(self) -> DistilArgs:
        """The same arguments with ``run`` filled in: runs/MODEL-bNN[-METHOD]."""
        if self.run is not None:
            return self
        model = Path(self.student or self.teacher).name.lower().removesuffix(".gguf") or "model"
        suffix = "" if self.method == "budgeted" else f"-{self.method}"
        budget = "" if self.method == "lora" else f"-b{round(100 * self.budget):02d}"
        return replace(self, run=f"runs/{model}{budget}{suffix}")

    @property
    def sequences(self) -> int:
        """Sequences of whole optimiser steps within ``tokens``."""
        return self.tokens // self.batch_tokens * (self.batch_tokens // self.seq_len)

    @property
    def fewshot_sequences(self) -> int:
        return round(self.fewshot_share * self.sequences)

    @property
    def refit_sequences(self) -> int:
        """Sequences set aside for the refit, by every method, so that all train on the same."""
        tokens = min(self.tokens, MOST_REFIT_TOKENS)
        return (tokens if self.refit_tokens is None else self.refit_tokens) // self.seq_len

    @property
    def narrows(self) -> bool:
        """Whether the plan decides on the neurons of MLPs; baselines have pairs only."""
        return self.mlp == "narrow" and self.method == "budgeted"

    @property
    def learns_allocation(self) -> bool:
        return self.method == "budgeted" and "learned" in self.allocation and self.budget < 1

    @property
    def factor_forms(self) -> tuple[str, ...]:
        """What each calibration stage of the run makes (distill/factors.py); none where every
        module is kept."""
        if self.method == "lora" or self.budget >= 1:
            return ()
        if self.method == "svd":
            return ("svd",)
        last = "narrow" if self.narrows else "pair"
        return ("pair", last) if self.learns_allocation else (last,)

    @property
    def run_directory(self) -> Path:
        return Path(self.with_default_run().run or "")


RUN_CONTROL = ("run", "resume", "overwrite", "plan_only")


def parse_args(argv: Sequence[str]) -> DistilArgs:
    """Parse and validate; raises UserError that reports every wrong flag at once."""
    values = parse_flags(
        DistilArgs,
        argv,
        prog="python -m distill",
        description="Distil a causal language model into a student that keeps a compute budget.",
    )
    args = DistilArgs(**values).with_default_run()
    _require_no_contradiction(args)
    if args.resume:
        args = _resumed(args, values)
        _require_no_contradiction(args)
    return args


def _require_no_contradiction(args: DistilArgs) -> None:
    problems = _contradictions(args)
    if problems:
        raise UserError("; ".join(problems))


def _contradictions(args: DistilArgs) -> list[str]:
    problems = []
    if args.batch_tokens % args.seq_len:
        problems.append(
            f"--batch-tokens {args.batch_tokens}: must be a multiple of --seq-len {args.seq_len}; "
            f"use {max(1, args.batch_tokens // args.seq_len) * args.seq_len}"
        )
    if args.refit_tokens is not None and 0 < args.refit_tokens < args.seq_len:
        problems.append(
            f"--refit-tokens {args.refit_tokens}: less than a sequence of {args.seq_len} tokens; "
            "use 0 for none, or that many at least"
        )
    if args.refit_tokens and args.method == "budgeted" and args.anneal:
        problems.append(
            f"--refit-tokens {args.refit_tokens}: there is no refit with --anneal; "
            "drop one of the two"
        )
    if args.anneal and args.narrows:
        problems.append(
            f"--anneal {args.anneal:g}: the neurons of a narrowed MLP are cut at once; "
            "use --mlp pair or drop --anneal"
        )
    if args.tokens < args.batch_tokens:
        problems.append(
            f"--tokens {args.tokens}: less than one step of {args.batch_tokens}; "
            "raise it or lower --batch-tokens"
        )
    elif 0 < args.sequences == args.fewshot_sequences:
        problems.append(
            f"--fewshot-share {args.fewshot_share:g}: leaves none of the {args.sequences} "
            "sequences to text; needs one or more; lower it or raise --tokens"
        )
    if args.plan_only and args.learns_allocation:
        problems.append(
            f"--plan-only: --allocation {args.allocation} has no plan before it has trained; use "
            "--allocation spectral or drop --plan-only"
        )
    if args.shard_teacher:
        problems += _sharding_problems(args)
    if args.resume and args.overwrite:
        problems.append("--resume and --overwrite exclude one another; give one of them")
    return problems


def _sharding_problems(args: DistilArgs) -> list[str]:
    """What a sharded teacher rules out: all that gives each process a whole dense copy of it."""
    barred = {
        "--method lora": args.method == "lora",
        f"--allocation {args.allocation}": "learned" in args.allocation,
        f"--anneal {args.anneal:g}": args.anneal > 0,
        "--budget 1": args.budget >= 1,
        "--teacher-pass disk": args.teacher_pass == "disk",
    }
    return [
        f"--shard-teacher and {given} exclude one another; drop one of the two"
        for given, wrong in barred.items()
        if wrong
    ]


def _resumed(args: DistilArgs, given: dict[str, Any]) -> DistilArgs:
    """The arguments of the interrupted run; a flag that differs from them is an error."""
    path = args.run_directory / "request.json"
    if not path.exists():
        raise UserError(
            f"--resume: {path} does not exist; needs an interrupted run{_interrupted()}; "
            "name it with --run DIR or start without --resume"
        )
    recorded = recorded_request(path)
    try:
        before = DistilArgs(**{**recorded, "data": tuple(recorded["data"])})
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


def _interrupted() -> str:
    """Those below the default folder, for a message."""
    requests = sorted(Path("runs").glob("*/request.json"))
    runs = [str(path.parent) for path in requests if not (path.parent / "student").exists()]
    return f", such as {', '.join(runs)}" if runs else ""


def recorded_request(path: Path) -> dict[str, Any]:
    """What request.json of a run says; one from before MLPs were narrowed had pairs."""
    recorded = read_json(path)
    return {"mlp": "pair", **recorded} if isinstance(recorded, dict) else {}


def request_json(args: DistilArgs) -> dict[str, Any]:
    """What request.json records: all that shapes the result, none of what steers this call."""
    values = {k: v for k, v in asdict(args).items() if k not in RUN_CONTROL}
    return json.loads(json.dumps(values))
