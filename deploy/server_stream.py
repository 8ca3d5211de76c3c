"""Server-sent events: a response that is written as the scheduler delivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.server_answers import DONE, Answer, error_event
from deploy.server_choice import Delta
from deploy.server_mailbox import Mailbox

CLIENT_CLOSED = 499  # as nginx calls it: nobody reads this answer
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """One streamed answer. `give_up` tells the scheduler that nobody reads it any more."""

    media_type = "text/event-stream"

    def __init__(
        self, answer: Answer, mailbox: Mailbox, with_usage: bool, give_up: Callable[[], None]
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.answer = answer
        self.mailbox = mailbox
        self.with_usage = with_usage
        self.give_up = give_up

    async def opened(self, request: Request) -> Response:
        """Wait for the first delta: an error that comes before it still gets its own status."""
        try:
            async with hang_up_watch(request.receive, self.mailbox):
                first = await self.mailbox.take()
            if not first:
                self.give_up()
                return Response(status_code=CLIENT_CLOSED)
            raise_error(first[0])
        except BaseException:
            self.give_up()
            raise
        self.mailbox.put_back(first)
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with hang_up_watch(receive, self.mailbox):
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
                await self._write(send)
        finally:
            self.give_up()

    async def _write(self, send: Send) -> None:
        while True:
            deltas = await self.mailbox.take()
            if not deltas:
                return
            is_over = False
            events = []
            for delta in deltas:
                if delta.error is not None:
                    events.append(error_event(delta.error))
                    is_over = True
                    break
                self.answer.add(delta)
                events.append(self.answer.chunks(delta, self.with_usage))
            if self.answer.is_complete and not is_over:
                is_over = True
                if self.with_usage:
                    events.append(self.answer.usage_chunk())
                events.append(DONE)
            body = b"".join(events)
            await send({"type": "http.response.body", "body": body, "more_body": not is_over})
            if is_over:
                return


@asynccontextmanager
async def hang_up_watch(receive: Receive, mailbox: Mailbox) -> AsyncIterator[None]:
    """Close the mailbox when the client goes away while the block runs."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        mailbox.close()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def raise_error(delta: Delta) -> None:
    if delta.error is not None:
        raise delta.error
