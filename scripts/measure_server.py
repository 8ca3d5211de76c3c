"""Measure the server under load and write docs/measured/server.json.

    python scripts/measure_server.py --run RUN [--engine int8] [--clients 64] [--seconds 120]

Starts `python -m deploy serve` as a process of its own on a free port. One client streams alone,
then all of them at once, each asking again as soon as its answer ends. The clients share the
machine with the server; what they take is reported as their CPU time. A second of warm-up and
the ramp, until every client has its first token, are left out of the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distill.artifact import UserError, write_json  # noqa: E402
from distill.console import table  # noqa: E402

MEASURED = ROOT / "docs" / "measured" / "server.json"
WORDS = "river boat stone mill town water field bread winter council teacher sea".split()
START_SECONDS = 120.0
MEMORY_SECONDS = 1.0
MIB = 2**20


@dataclass
class Observed:
    """What the clients of one phase saw, on `time.perf_counter`'s clock.

    `token_times_s`: of every answer, when each of its tokens came.
    """

    token_times_s: list[list[float]] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def between(self, from_s: float, until_s: float) -> dict[str, Any]:
        """Rates and latencies of the tokens that came in a window."""
        gaps_ms, first_ms, tokens = [], [], 0
        for start_s, times_s in zip(self.started_s, self.token_times_s, strict=True):
            tokens += sum(from_s <= at < until_s for at in times_s)
            if times_s and from_s <= start_s:
                first_ms.append(1e3 * (times_s[0] - start_s))
            pairs = zip(times_s, times_s[1:], strict=False)
            gaps_ms += [1e3 * (b - a) for a, b in pairs if from_s <= a and b < until_s]
        return {
            "seconds": until_s - from_s,
            "tokens": tokens,
            "tokens_per_s": tokens / (until_s - from_s),
            "answers": len(self.token_times_s),
            "errors": len(self.errors),
            "time_to_first_token_ms": percentiles(first_ms),
            "time_between_tokens_ms": percentiles(gaps_ms),
        }


def main() -> int:
    args = arguments()
    command = [
        sys.executable, "-m", "deploy", "serve", "--port", "0", "--run", args.run,
        "--max-streams", str(args.clients), "--model-name", "student",
        *(["--engine", args.engine] if args.engine else []),
        *(["--threads", str(args.threads)] if args.threads else []),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=Path.cwd(), env=environment()
    )
    try:
        port = wait_for_port(server)
        figures = asyncio.run(measure(args, port, psutil.Process(server.pid)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        server.send_signal(signal.SIGTERM)
        figures_status = server.wait(60)
    figures |= {"command": command[1:], "exit_status": figures_status, **machine()}
    write_json(args.output, figures)
    report(figures)
    return 0 if figures["many"]["errors"] == 0 and figures_status == 0 else 1


async def measure(args: argparse.Namespace, port: int, process: psutil.Process) -> dict[str, Any]:
    """One stream, then `args.clients` at once for `args.seconds`."""
    alone = Observed()
    await asyncio.wait_for(client(port, 0, args, alone, time.perf_counter() + 1), 60)
    alone = Observed()
    began_s = time.perf_counter()
    until_s = began_s + args.single_seconds
    await client(port, 1, args, alone, until_s)
    single = alone.between(began_s, until_s)
    memory: list[tuple[float, float]] = []
    many, cpu_s = Observed(), process.cpu_times()
    own_s = time.process_time()
    began_s = time.perf_counter()
    until_s = began_s + args.seconds
    watcher = asyncio.create_task(watch_memory(process, memory, began_s))
    await asyncio.gather(*(client(port, i, args, many, until_s) for i in range(args.clients)))
    watcher.cancel()
    warm_s = max(times[0] for times in many.token_times_s[: args.clients] if times)
    used_s = process.cpu_times()
    many_figures = many.between(warm_s, until_s)
    return {
        "clients": args.clients,
        "max_tokens": args.max_tokens,
        "health": await health(port),
        "single": single,
        "many": {**many_figures, "ramp_s": warm_s - began_s, "error_examples": many.errors[:5]},
        "speedup": many_figures["tokens_per_s"] / single["tokens_per_s"],
        "memory": memory_figures(memory, warm_s - began_s),
        "server_cpu_s": used_s.user + used_s.system - cpu_s.user - cpu_s.system,
        "clients_cpu_s": time.process_time() - own_s,
    }


async def client(
    port: int, number: int, args: argparse.Namespace, seen: Observed, until_s: float
) -> None:
    """Ask again and again until `until_s`; the last answer is cut there."""
    rng = random.Random(number)
    while time.perf_counter() < until_s:
        times_s: list[float] = []
        seen.started_s.append(time.perf_counter())
        seen.token_times_s.append(times_s)
        try:
            await stream(port, request_body(rng, args), times_s, until_s)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)


async def stream(port: int, body: bytes, times_s: list[float], until_s: float) -> None:
    """Read one streamed answer and note when each token came.

    Tokens are counted as the usage of the last event counts them: one event may carry the text of
    several tokens, whose times are then the event's.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode().strip())
        is_complete = False
        while line := await reader.readline():
            if line.startswith(b'data: {"error"'):
                raise RuntimeError(line.decode().strip())
            if line.startswith(b"data: {") and b'"choices": [{' in line:
                times_s.append(time.perf_counter())
            is_complete = is_complete or line.startswith(b"data: [DONE]")
            if time.perf_counter() >= until_s:
                return
        if not is_complete:
            raise RuntimeError("the stream ended before [DONE]")
    finally:
        writer.close()


def request_body(rng: random.Random, args: argparse.Namespace) -> bytes:
    """A prompt of random words, and half to all of `max_tokens` tokens to generate."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(8, args.prompt_words)))
    return json.dumps(
        {
            "model": "student",
            "prompt": prompt,
            "max_tokens": rng.randint(args.max_tokens // 2, args.max_tokens),
            "temperature": args.temperature,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }
    ).encode()


async def watch_memory(
    process: psutil.Process, samples: list[tuple[float, float]], began_s: float
) -> None:
    while True:
        samples.append((time.perf_counter() - began_s, process.memory_info().rss / MIB))
        await asyncio.sleep(MEMORY_SECONDS)


def memory_figures(samples: Sequence[tuple[float, float]], warm_s: float) -> dict[str, Any]:
    """Resident MiB early and late, and its slope by least squares over the second half."""
    warm = [(at, mib) for at, mib in samples if at >= warm_s] or list(samples)
    late = warm[len(warm) // 2 :]
    figures = {
        "start_mib": warm[0][1],
        "end_mib": warm[-1][1],
        "peak_mib": max(mib for _, mib in samples),
    }
    if len(late) > 2:
        slope = statistics.linear_regression([at for at, _ in late], [mib for _, mib in late])
        figures["slope_mib_per_minute"] = 60 * slope.slope
    return figures


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    if len(values_ms) < 2:
        return {}
    cuts = statistics.quantiles(values_ms, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values_ms)}


async def health(port: int) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def wait_for_port(server: subprocess.Popen[str]) -> int:
    """The port of the line that the server writes when it listens."""
    assert server.stderr is not None
    until_s = time.monotonic() + START_SECONDS
    while time.monotonic() < until_s and (line := server.stderr.readline()):
        print(line, end="", file=sys.stderr)
        if match := re.search(r"http://[^/]*:(\d+)/v1", line):
            return int(match[1])
    raise UserError("the server did not start; see its message above")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_1min_before_end": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def report(figures: dict[str, Any]) -> None:
    rows = []
    for name in ("single", "many"):
        phase = figures[name]
        gaps, first = phase["time_between_tokens_ms"], phase["time_to_first_token_ms"]
        rows.append(
            [
                f"{1 if name == 'single' else figures['clients']}",
                phase["tokens_per_s"],
                gaps.get("p50", "–"),
                gaps.get("p95", "–"),
                first.get("p50", "–"),
                first.get("p95", "–"),
                phase["errors"],
            ]
        )
    columns = (
        "streams", "tokens/s", "between tokens p50 (ms)", "p95 (ms)", "first token p50 (ms)",
        "p95 (ms)", "errors",
    )  # fmt: skip
    table("server", columns, rows)
    print(json.dumps({"speedup": figures["speedup"], "memory": figures["memory"]}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder or engine directory")
    parser.add_argument("--engine", help="engine of that run, as for deploy serve")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--single-seconds", type=float, default=15.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--output", type=Path, default=MEASURED)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
