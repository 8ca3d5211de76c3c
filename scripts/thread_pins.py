"""Every thread on a core of its own while contenders are timed.

Unpinned, Linux now and then wakes a session's second thread on the core of its first, and keeps it
there: two threads then take more than twice the time of the next call's.
"""

from __future__ import annotations

import os
from types import TracebackType


class ThreadPins:
    """Keeps the calling thread on the first core, and those that it starts on the other ones."""

    def __enter__(self) -> ThreadPins:
        self._cores = sorted(os.sched_getaffinity(0))
        self._known = _threads()
        self._count = 0
        os.sched_setaffinity(0, self._cores[:1])
        return self

    def pin(self) -> None:
        """Give cores, in turn, to the threads that were started since the last call."""
        others = self._cores[1:] or self._cores
        for thread in sorted(_threads() - self._known):
            os.sched_setaffinity(thread, {others[self._count % len(others)]})
            self._count += 1
        self._known = _threads()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.sched_setaffinity(0, self._cores)


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
