"""An engine without weights for the server's tests, and the server in a thread.

The fake's next token depends on every real token of a row and on its positions, so that a row
which loses or gains a token, or sees its neighbour's, continues differently.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.server import add_arguments, engine_limits, served_model
from deploy.server_app import Service, build_app
from deploy.server_http import BoundedProtocol, DrainingServer, bind, make_server
from deploy.server_mailbox import Post
from deploy.server_metrics import Metrics
from deploy.server_scheduler import Scheduler
from deploy.text import load_text

VOCABULARY = 384
PRIME = 1_000_003


class FakeCache:
    """Ids and positions [B, T] as they were fed; zeros where `pad_left` or `concat` padded."""

    def __init__(self, ids_BT: np.ndarray, positions_BT: np.ndarray) -> None:
        self.ids_BT, self.positions_BT = ids_BT, positions_BT

    @property
    def batch(self) -> int:
        return len(self.ids_BT)

    @property
    def length(self) -> int:
        return self.ids_BT.shape[1]

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> FakeCache:
        return FakeCache(change(self.ids_BT), change(self.positions_BT))

    def select(self, rows: Sequence[int]) -> FakeCache:
        return self._map(lambda a: a[list(rows)])

    def compact(self, rows: Sequence[int], columns: int) -> FakeCache:
        return self.select(rows).trim_left(columns)

    def extend(self, other: FakeCache) -> FakeCache:
        return self.concat(other)

    def pad_left(self, columns: int) -> FakeCache:
        return self._map(lambda a: np.pad(a, ((0, 0), (columns, 0))))

    def shift(self, columns: int) -> FakeCache:
        return self.pad_left(columns)

    def trim_left(self, columns: int) -> FakeCache:
        return self._map(lambda a: a[:, columns:])

    def truncate(self, length: int) -> FakeCache:
        return self._map(lambda a: a[:, :length])

    def replace(self, rows: Sequence[int], other: FakeCache) -> None:
        wide = other.pad_left(self.length - other.length)
        self.ids_BT[list(rows)] = wide.ids_BT
        self.positions_BT[list(rows)] = wide.positions_BT

    def concat(self, other: FakeCache) -> FakeCache:
        columns = max(self.length, other.length)
        a, b = (cache.pad_left(columns - cache.length) for cache in (self, other))
        return FakeCache(
            np.concatenate([a.ids_BT, b.ids_BT]),
            np.concatenate([a.positions_BT, b.positions_BT]),
        )


class FakeRunner:
    """Implements `deploy.runner.Runner`."""

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        max_context: int = 512,
        max_batch: int | None = None,
        max_new: int | None = None,
        step_s: float = 0.0,
        eos_token_ids: tuple[int, ...] = (2,),
        fails_on: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.max_context = max_context
        self.max_batch = max_batch
        self.max_new = max_new
        self.step_s = step_s
        self.eos_token_ids = eos_token_ids
        self.cache_bytes_per_token = 1024
        self.fails_on = fails_on
        self.shapes: list[tuple[int, int]] = []
        self.thread: int | None = None

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def new_cache(self, batch: int) -> FakeCache:
        return FakeCache(np.zeros((batch, 0), np.int64), np.zeros((batch, 0), np.int64))

    def forward(
        self,
        input_ids_BS: np.ndarray,
        cache: Any,
        *,
        attention_mask_BT: np.ndarray | None = None,
        position_ids_BS: np.ndarray | None = None,
        logits_to_keep: int | None = None,
    ) -> np.ndarray:
        assert attention_mask_BT is not None and position_ids_BS is not None
        assert logits_to_keep == 1
        self._check_call(input_ids_BS, cache, attention_mask_BT)
        if self.step_s:
            time.sleep(self.step_s)
        if self.fails_on is not None and (input_ids_BS == self.fails_on).any():
            raise RuntimeError("the fake engine broke")
        cache.ids_BT = np.concatenate([cache.ids_BT, input_ids_BS], axis=1)
        cache.positions_BT = np.concatenate([cache.positions_BT, position_ids_BS], axis=1)
        rows = zip(cache.ids_BT, cache.positions_BT, attention_mask_BT == 1, strict=True)
        return np.stack([self._logits(ids[m], places[m]) for ids, places, m in rows])[:, None]

    def close(self) -> None:
        pass

    def _check_call(self, ids_BS: np.ndarray, cache: Any, mask_BT: np.ndarray) -> None:
        here = threading.get_ident()
        self.thread = self.thread or here
        assert self.thread == here, "two threads use one runner"
        batch, new = ids_BS.shape
        assert batch == cache.batch and mask_BT.shape == (batch, cache.length + new)
        assert self.max_batch is None or batch <= self.max_batch
        assert self.max_new is None or new <= self.max_new
        assert cache.length + new <= self.max_context
        self.shapes.append((batch, new))

    def _logits(self, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        code = 7
        for token, place in zip(ids.tolist(), places.tolist(), strict=True):
            code = (code * 31 + 17 * token + place + 1) % PRIME
        return np.random.default_rng(code).normal(size=self.vocabulary).astype(np.float32)


@dataclass
class Running:
    """A server that listens."""

    url: str
    port: int
    scheduler: Scheduler
    server: DrainingServer
    metrics: Metrics
    runner: Any
    thread: threading.Thread

    def wait_idle(self, seconds: float = 10.0) -> bool:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            if self.scheduler.is_idle:
                return True
            time.sleep(0.01)
        return False


def arguments(*flags: str) -> argparse.Namespace:
    """The flags of `serve`, parsed as the command parses them."""
    from deploy.args import Parser, parse

    parser = Parser(prog="python -m deploy serve", allow_abbrev=False)
    add_arguments(parser)
    return parse(parser, list(flags))


@contextlib.contextmanager
def running_server(
    runner: Any,
    directory: Path,
    *flags: str,
    api_key: str | None = None,
    stall_seconds: float = 30.0,
    model_changes: dict[str, Any] | None = None,
) -> Iterator[Running]:
    """Serve `runner` with the tokenizer in `directory` until the block ends."""
    args = arguments("--port", "0", "--cache-gib", "1", "--model-name", "tiny", *flags)
    listening = bind(args.host, args.port)
    text, metrics, post = load_text(directory), Metrics(), Post()
    limits = engine_limits(runner, min(runner.vocabulary, text.size), args)
    model = served_model(directory, text, runner, limits, args)
    model = replace(model, **(model_changes or {}))
    scheduler = Scheduler(runner, limits, metrics, max_waiting=args.max_queue, deliver=post.deliver)
    service = Service(
        model, scheduler, metrics, api_key, args.max_body_kib * 1024, runner.describe()
    )
    ready = threading.Event()

    def start() -> None:
        import asyncio

        post.loop = asyncio.get_running_loop()
        scheduler.start()
        ready.set()

    server = make_server(
        build_app(service),
        scheduler,
        drain_seconds=args.drain_seconds,
        max_connections=args.max_streams + args.max_queue + 64,
        access_log=False,
        on_start=start,
    )
    protocol = type("Quick", (BoundedProtocol,), {"stall_seconds": stall_seconds})
    server.config.http = protocol
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    port = listening.getsockname()[1]
    thread.start()
    assert ready.wait(10)
    try:
        url = f"http://127.0.0.1:{port}"
        yield Running(url, port, scheduler, server, metrics, runner, thread)
    finally:
        scheduler.stop()
        server.should_exit = True
        thread.join(15)
        scheduler.join(5)
        assert not thread.is_alive() and not scheduler.is_alive()


def raw_connection(port: int, receive_bytes: int | None = None) -> socket.socket:
    """A bare TCP connection; `receive_bytes`: size of its receive buffer."""
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    return connection


def http_bytes(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it goes over the wire."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
