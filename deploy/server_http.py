"""uvicorn, with bounds on slow clients and a shutdown that lets running answers end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.server_scheduler import Scheduler
from distill.commit import UserError

STALL_SECONDS = 30.0
HEADER_SECONDS = 30.0
POLL_SECONDS = 0.05
MAX_HEADER_BYTES = 64 * 1024
BACKLOG = 512
SEND_BUFFER_BYTES = 128 * 1024  # what the kernel holds for a client that does not read


class BoundedProtocol(H11Protocol):
    """Drops clients that send no request or do not read their answer within some seconds."""

    stall_seconds = STALL_SECONDS
    header_seconds = HEADER_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._abort_after(self.header_seconds)

    def data_received(self, data: bytes) -> None:
        is_new = self.cycle is None or self.cycle.response_complete
        if is_new and self._timer is None:
            self._abort_after(self.header_seconds)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._keep()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_after(self.stall_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _abort_after(self, seconds: float) -> None:
        self._keep()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class DrainingServer(uvicorn.Server):
    """On the first signal running answers may end and new requests get 503; then it exits.

    A second signal, or `drain_seconds`, ends the running answers with an error.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, drain_seconds: float) -> None:
        super().__init__(config)
        self.scheduler = scheduler
        self.drain_seconds = drain_seconds
        self.signals: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only notes the signal: a handler may interrupt code that holds the scheduler's lock."""
        self.signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        if self.signals and not self.scheduler.is_draining:
            self.scheduler.drain()
            asyncio.get_running_loop().create_task(self._exit_when_idle(), name="drain")
        return await super().on_tick(counter)

    async def _exit_when_idle(self) -> None:
        until_s = time.monotonic() + self.drain_seconds
        while time.monotonic() < until_s and len(self.signals) < 2:
            if self.scheduler.is_idle and not self.server_state.tasks:
                break
            await asyncio.sleep(POLL_SECONDS)
        self.scheduler.stop()
        self.should_exit = True


def make_server(
    app: ASGIApp,
    scheduler: Scheduler,
    *,
    drain_seconds: float,
    max_connections: int,
    access_log: bool,
    on_start: Callable[[], None],
) -> DrainingServer:
    """A server that has not begun; `on_start` is called on its event loop when it listens."""

    async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        on_start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    config = uvicorn.Config(
        with_lifespan,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level="info" if access_log else "error",
        access_log=access_log,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=BACKLOG,
    )
    return DrainingServer(config, scheduler, drain_seconds)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: UserError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host}: no such address ({error}); needs one of this machine's addresses; "
            "use 127.0.0.1 for this machine only, 0.0.0.0 for all networks"
        ) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise UserError(_bind_failure(host, port, error)) from None
    return bound


def exit_status(signals: list[int]) -> int:
    """130 after Ctrl-C, as for every command here; 0 after SIGTERM."""
    return 130 if signal.SIGINT in signals else 0


def _bind_failure(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port {port}: another program listens on {host}:{port}; needs a free port; give "
            "another, or 0 for any free one"
        )
    if error.errno == errno.EACCES:
        return f"--port {port}: not allowed to this user; needs a port from 1024 on; give another"
    return (
        f"--host {host} --port {port}: cannot be used ({error.strerror}); needs an address of "
        "this machine; use 127.0.0.1 or 0.0.0.0"
    )
