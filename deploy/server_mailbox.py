"""Deltas on their way from the scheduler's thread to one HTTP request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from deploy.server_choice import Choice, Delta

MOST_UNREAD = 4096


class Mailbox:
    """Holds what a request has not read yet. Everything here runs on the event loop's thread.

    A reader that falls `most_unread` deltas behind loses its mailbox: its memory stays bounded
    and its choices are given up.
    """

    def __init__(self, most_unread: int = MOST_UNREAD) -> None:
        self.most_unread = most_unread
        self.is_closed = False
        self._unread: deque[Delta] = deque()
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        if len(self._unread) >= self.most_unread:
            self.close()
        if not self.is_closed:
            self._unread.append(delta)
            self._changed.set()

    def put_back(self, deltas: Sequence[Delta]) -> None:
        self._unread.extendleft(reversed(deltas))
        self._changed.set()

    def close(self) -> None:
        """Nobody reads any more: the client hung up or is too slow."""
        self.is_closed = True
        self._unread.clear()
        self._changed.set()

    async def take(self) -> list[Delta]:
        """All that is unread, at least one; empty once the mailbox is closed."""
        while not self._unread and not self.is_closed:
            self._changed.clear()
            await self._changed.wait()
        taken = list(self._unread)
        self._unread.clear()
        return taken


class Post:
    """Carries the scheduler's deltas over to the event loop, one wake-up a turn."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def deliver(self, deltas: list[tuple[Choice, Delta]]) -> None:
        """Called on the scheduler's thread. After the loop's end nobody is left to read."""
        if self.loop is not None:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(_distribute, deltas)


def _distribute(deltas: list[tuple[Choice, Delta]]) -> None:
    for choice, delta in deltas:
        choice.sink.put(delta)
