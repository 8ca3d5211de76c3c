"""``python -m deploy generate``: continue prompts or answer chat messages, streaming."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.args import add_engine_arguments, number, whole
from deploy.chat import Conversation, converse
from deploy.decoding import decode
from deploy.engines import engine_name, find_engine
from deploy.prompts import Prompt, read_batch, read_prompt
from deploy.runner import Runner, open_runner
from deploy.sampling import Sampler, SamplingSettings
from deploy.server_choice import Choice, Delta
from deploy.text import StopStrings, Text, load_text
from distill.commit import UserError, read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="the prompt; - or none: standard input"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="use the model's chat template; on a terminal without a PROMPT: a conversation",
    )
    parser.add_argument("--system", help="system message of --chat")
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help='many prompts: .txt with one a line, or .jsonl with {"prompt": …} or '
        '{"messages": …} a line (- reads JSON lines from standard input); answers go to '
        "standard output as JSON lines in the same order",
    )
    parser.add_argument(
        "--batch-size", type=whole(1, 1024), default=8, help="prompts at a time (default 8)"
    )
    parser.add_argument(
        "--max-tokens", type=whole(1, 2**20), default=256, help="longest answer (default 256)"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on after the model's end token"
    )
    parser.add_argument("--quiet", action="store_true", help="no figures on standard error")
    add_engine_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "What is not given comes from the model's generation_config.json."
    )
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument("--temperature", type=number(0, 100), help="0: greedy")
    group.add_argument("--top-k", type=whole(0), help="only the k likeliest tokens; 0: all")
    group.add_argument(
        "--top-p", type=number(0, 1, above=True), help="only the likeliest tokens up to p; 1: all"
    )
    group.add_argument(
        "--min-p", type=number(0, 1), help="at least this share of the likeliest; 0: all"
    )
    group.add_argument(
        "--repetition-penalty",
        type=number(0, 100, above=True),
        help="above 1: tokens of prompt and answer become less likely",
    )
    group.add_argument("--presence-penalty", type=number(-100, 100), help="OpenAI's")
    group.add_argument("--frequency-penalty", type=number(-100, 100), help="OpenAI's")
    group.add_argument("--seed", type=whole(0, 2**63), help="same answer every time")


def run(args: argparse.Namespace) -> int:
    """Exit status 0; raises UserError for everything that the user can put right."""
    is_conversation = args.chat and not args.prompt and args.batch is None and sys.stdin.isatty()
    if args.batch is not None and args.prompt:
        raise UserError("a PROMPT and --batch exclude one another; give one of them")
    if args.system is not None and not args.chat:
        raise UserError("--system belongs to a conversation; add --chat or leave it out")
    directory = find_engine(args.run, args.engine)
    settings = sampling_settings(args, directory)
    prompts: Sequence[Prompt] = ()
    if not is_conversation:
        prompts = read_batch(args.batch) if args.batch is not None else [read_prompt(args.prompt)]
    runner = open_runner(directory, provider=args.provider, threads=args.threads)
    text = load_text(directory)

    def choose(index: int, ids: Sequence[int]) -> Choice:
        return _choice(index, ids, runner, text, settings, args)

    if is_conversation:
        converse(Conversation(runner, text, lambda ids: choose(0, ids), args.system))
        return 0
    ids = [_ids(prompt, text, args) for prompt in prompts]
    choices = [choose(i, p) for i, p in enumerate(ids)]
    show: Callable[[Choice, Delta], None] = _shown
    if args.batch is not None:
        show = BatchOutput(prompts)
    speed = decode(runner, choices, show, batch_size=args.batch_size)
    if args.batch is None:
        print(flush=True)
    if not args.quiet:
        name = f"{engine_name(directory)}, {runner.describe()['threads'] or 'all'} threads"
        print(f"{name}: {speed.line()}", file=sys.stderr)
    return 0


def sampling_settings(args: argparse.Namespace, directory: Path) -> SamplingSettings:
    """Flags before generation_config.json; greedy when neither asks for sampling.

    Raises: UserError when --greedy stands beside a temperature.
    """
    if args.greedy and args.temperature:
        raise UserError(
            f"--greedy and --temperature {args.temperature:g} exclude one another; give one of them"
        )
    path = directory / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    flags = (*names, "presence_penalty", "frequency_penalty")
    values: dict[str, Any] = {name: config[name] for name in names if _is_number(config.get(name))}
    if config.get("do_sample"):
        values["temperature"] = config.get("temperature") or 1.0
    else:
        asked = any(getattr(args, name) is not None for name in ("top_k", "top_p", "min_p", "seed"))
        values["temperature"] = 1.0 if asked else 0.0
    given = {name: getattr(args, name) for name in (*flags, "temperature")}
    values |= {name: value for name, value in given.items() if value is not None}
    if args.greedy:
        values["temperature"] = 0.0
    return SamplingSettings(**values, seed=args.seed)


class BatchOutput:
    """Answers as JSON lines on standard output, in the order of the prompts."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._texts = [""] * len(prompts)
        self._ready: dict[int, dict[str, Any]] = {}
        self._next = 0

    def __call__(self, choice: Choice, delta: Delta) -> None:
        self._texts[choice.index] += delta.text
        if not delta.is_last:
            return
        self._ready[choice.index] = {
            "index": choice.index,
            "prompt": self._prompts[choice.index],
            "text": self._texts[choice.index],
            "finish_reason": delta.finish,
            "prompt_tokens": len(choice.prompt),
            "completion_tokens": len(choice.generated),
        }
        while self._next in self._ready:
            print(json.dumps(self._ready.pop(self._next), ensure_ascii=False), flush=True)
            self._next += 1


def _shown(choice: Choice, delta: Delta) -> None:
    sys.stdout.write(delta.text)
    sys.stdout.flush()


def _ids(prompt: Prompt, text: Text, args: argparse.Namespace) -> list[int]:
    """Token ids of a plain prompt, or of a conversation rendered by the chat template."""
    if isinstance(prompt, str) and not args.chat:
        return text.encode(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return text.encode(text.apply_chat_template(messages), add_special_tokens=False)


def _choice(
    index: int,
    ids: Sequence[int],
    runner: Runner,
    text: Text,
    settings: SamplingSettings,
    args: argparse.Namespace,
) -> Choice:
    """An answer gets what the context leaves of --max-tokens, one token at least."""
    room = max(1, runner.max_context - len(ids))
    return Choice(
        index=index,
        prompt=tuple(ids),
        max_new=min(args.max_tokens, room),
        sampler=Sampler(settings, ids),
        detokenizer=text.detokenizer(ids),
        stops=StopStrings(args.stop),
        end_tokens=() if args.ignore_eos else runner.eos_token_ids,
        top_logprobs=None,
        sink=None,
        deadline_s=math.inf,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
