"""``python -m deploy serve``: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.args import add_engine_arguments, number, whole
from deploy.engines import engine_name, find_engine
from deploy.runner import Runner, open_runner
from deploy.server_engine import EngineLimits
from deploy.server_mailbox import Post
from deploy.server_metrics import Metrics
from deploy.server_protocol import ModelLimits
from deploy.server_requests import Model
from deploy.server_scheduler import Scheduler
from deploy.text import Text, load_text
from distill.artifact import UserError, available_memory_bytes

API_KEY = "BUDGETED_LORA_API_KEY"
INSTALL = "pip install '.[serve]' in this project's folder"
KIB, GIB = 2**10, 2**30
CACHE_SHARE = 0.25
SPARE_CONNECTIONS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag with its unit, range and default."""
    add_engine_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=whole(0, 65535), default=8000, help="0: any free one (default 8000)")
    add("--model-name", help="name that requests use (default: the run folder's name)")
    add(
        "--max-streams",
        type=whole(1, 4096),
        default=64,
        help="answers generated at once (default 64)",
    )
    add(
        "--max-queue",
        type=whole(1, 65536),
        default=256,
        help="answers that may wait; more get status 429 (default 256)",
    )
    add("--max-tokens", type=whole(1), help="longest answer, tokens (default: the context)")
    add(
        "--max-context",
        type=whole(2),
        help="prompt and answer together, tokens (default: the model's context)",
    )
    add(
        "--max-seconds",
        type=number(0, above=True),
        default=600.0,
        help="longest time of an answer, queue included; a running one is cut with "
        "finish_reason length (default 600)",
    )
    add("--max-body-kib", type=whole(1, 2**20), default=1024, help="largest request (default 1024)")
    add(
        "--cache-gib",
        type=number(0, above=True),
        help="memory for keys and values (default: a quarter of what is available)",
    )
    add(
        "--prefill-tokens",
        type=whole(1, 65536),
        default=128,
        help="prompt tokens processed between two steps of the running answers: more reads "
        "prompts faster and makes running answers stutter (default 128)",
    )
    add(
        "--drain-seconds",
        type=number(0),
        default=30.0,
        help="how long running answers may go on after SIGTERM or Ctrl-C (default 30)",
    )
    add("--access-log", action="store_true", help="one line on stderr for every request")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Returns 0 after SIGTERM, 130 after Ctrl-C.

    Raises: UserError for a missing package, a bad engine or an address that cannot be had.
    """
    _require_packages()
    from deploy.server_app import Service, build_app
    from deploy.server_http import bind, exit_status, make_server

    api_key = _api_key()
    directory = find_engine(args.run, args.engine)
    listening = bind(args.host, args.port)
    with listening:
        runner = open_runner(
            directory, provider=args.provider, threads=args.threads, spinning=False
        )
        metrics, post = Metrics(), Post()
        text = load_text(directory)
        limits = engine_limits(runner, min(runner.vocabulary, text.size), args)
        model = served_model(directory, text, runner, limits, args)
        scheduler = Scheduler(
            runner, limits, metrics, max_waiting=args.max_queue, deliver=post.deliver
        )
        service = Service(
            model, scheduler, metrics, api_key, args.max_body_kib * KIB, runner.describe()
        )
        _warn_if_open(args.host, api_key)
        server = make_server(
            build_app(service),
            scheduler,
            drain_seconds=args.drain_seconds,
            max_connections=args.max_streams + args.max_queue + SPARE_CONNECTIONS,
            access_log=args.access_log,
            on_start=_starter(scheduler, post, listening.getsockname(), model, directory),
        )
        server.run(sockets=[listening])
        scheduler.stop()
        scheduler.join(timeout=30)
        runner.close()
    return exit_status(server.signals)


def engine_limits(runner: Runner, vocabulary: int, args: argparse.Namespace) -> EngineLimits:
    """Rows and cache that the engine, the memory here and the flags allow.

    Raises: UserError when the memory does not hold one answer.
    """
    cache_bytes = available_memory_bytes() * CACHE_SHARE
    if args.cache_gib is not None:
        cache_bytes = args.cache_gib * GIB
    cache_tokens = int(cache_bytes // runner.cache_bytes_per_token)
    if cache_tokens < 2:
        raise UserError(
            f"--cache-gib: {cache_bytes / GIB:.3g} GiB holds no answer, at "
            f"{runner.cache_bytes_per_token} bytes a token; give more, or free some memory"
        )
    rows = args.max_streams if runner.max_batch is None else min(args.max_streams, runner.max_batch)
    return EngineLimits(rows, cache_tokens, args.prefill_tokens, vocabulary)


def served_model(
    directory: Path, text: Text, runner: Runner, limits: EngineLimits, args: argparse.Namespace
) -> Model:
    """The model's name, texts and limits."""
    context = min(runner.max_context, limits.cache_tokens)
    if args.max_context is not None:
        if args.max_context > runner.max_context:
            raise UserError(
                f"--max-context {args.max_context}: this engine takes {runner.max_context} tokens; "
                "give at most that many, or build an engine for more"
            )
        context = min(context, args.max_context)
    return Model(
        name=args.model_name or _default_name(directory),
        text=text,
        context=context,
        eos_token_ids=runner.eos_token_ids,
        limits=ModelLimits(limits.vocabulary, min(args.max_tokens or context, context - 1)),
        max_seconds=args.max_seconds,
        created=int(time.time()),
    )


def _default_name(directory: Path) -> str:
    """The run folder's name, or the engine's where there is none."""
    directory = directory.absolute()
    if engine_name(directory) == directory.name:
        return directory.name
    return directory.parents[1].name


def _starter(
    scheduler: Scheduler, post: Post, address: Any, model: Model, directory: Path
) -> Callable[[], None]:
    """What happens once the server listens: the scheduler starts, one line says where."""

    def start() -> None:
        post.loop = asyncio.get_running_loop()
        scheduler.start()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(
            f"serving {model.name} ({engine_name(directory)}) at http://{host}:{address[1]}/v1, "
            f"up to {scheduler.limits.max_rows} answers at once, context {model.context} tokens",
            file=sys.stderr,
            flush=True,
        )

    return start


def _api_key() -> str | None:
    """The key of the environment. Raises: UserError for one that no header can carry."""
    key = os.environ.get(API_KEY)
    if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
        raise UserError(
            f"{API_KEY} is {'empty' if not key.strip() else 'not printable ASCII'}; needs a key "
            "of printable ASCII characters; set another, or unset it to let everybody in"
        )
    return key


def _warn_if_open(host: str, api_key: str | None) -> None:
    if api_key is None and not _is_loopback(host):
        print(
            f"warning: {host} is open to the network and {API_KEY} is not set: anybody who "
            "reaches this port can use the model",
            file=sys.stderr,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_packages() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; needs starlette and uvicorn to serve; {INSTALL}"
        ) from None
